"""The fingerprint of a base model: one digest over its weights, whatever format they lie in.

It is the sha256 of the JSON list, sorted by Hugging Face name, of [name, safetensors name of the
type, shape, sha256 of the little-endian bytes]. A tied ``lm_head.weight`` is left out, so the value
is the same from a Hugging Face directory and from the Megatron checkpoint made of it.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from threading import Lock

import torch
from torch import Tensor

from nemotron.artifacts import sha256_json
from nemotron.steps._formats.safetensors_file import raw_bytes
from nemotron.steps._formats.weights import DTYPE_NAMES, Weights

_NUM_THREADS = min(4, os.cpu_count() or 1)
_MAX_WAITING_BYTES = 32_000_000  # tensors that are held only because they are being hashed


TensorEntry = tuple[str, list[int], str]  # name of the type, shape, sha256 of the bytes


class Fingerprint:
    """The fingerprint of weights that pass by one at a time, in any order, from any thread.

    Hashing goes on in threads, behind the caller's back: sha256 is slower than any disk that is
    worth having. When ``add`` returns, at most 32 MB wait, or a third of the largest tensor so far,
    however busy the machine is.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, list[int], Future[str]]] = {}
        self._waiting: deque[tuple[int, Future[str]]] = deque()
        self._threads = ThreadPoolExecutor(_NUM_THREADS)
        self._lock = Lock()
        self._largest_bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor, whose values stay as they are."""
        with self._lock:
            digest = self._threads.submit(_sha256, tensor)
            self._waiting.append((tensor.nbytes, digest))
            self._entries[name] = DTYPE_NAMES[tensor.dtype], list(tensor.shape), digest
            self._largest_bytes = max(self._largest_bytes, tensor.nbytes)
            limit = max(_MAX_WAITING_BYTES, self._largest_bytes // 3)
            while sum(size for size, _ in self._waiting) > limit:
                self._waiting.popleft()[1].result()

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return what is known of those of ``names`` that were taken in, hashed to their ends."""
        return {name: self._entry(name) for name in names if name in self._entries}

    def restore(self, *taken: Mapping[str, TensorEntry]) -> None:
        """Take in what ``entries`` said of tensors."""
        for name, (kind, shape, digest) in chain.from_iterable(each.items() for each in taken):
            self._entries[name] = kind, shape, _done(digest)

    def hexdigest(self) -> str:
        """Return the fingerprint of the tensors taken in so far."""
        return sha256_json([[name, *self._entry(name)] for name in sorted(self._entries)])

    def _entry(self, name: str) -> TensorEntry:
        kind, shape, digest = self._entries[name]
        return kind, shape, digest.result()


class FingerprintedWeights:
    """Weights whose fingerprint is taken while somebody reads them; see ``Weights``."""

    def __init__(self, weights: Weights, known: str | None = None) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self._weights = weights
        self._known = known
        self._fingerprint = Fingerprint()

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        if self._known is None and name not in self._fingerprint:
            self._fingerprint.add(name, tensor)
        return tensor

    def fingerprint(self) -> str:
        """Return the fingerprint: ``known``, or after reading what nobody has read yet."""
        if self._known is not None:
            return self._known
        for name in self.names:
            if name not in self._fingerprint:
                self.read(name)
        return self._fingerprint.hexdigest()


def base_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of a model's weights, reading one tensor at a time."""
    return FingerprintedWeights(weights).fingerprint()


def _done(digest: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(digest)
    return future


def _sha256(tensor: Tensor) -> str:
    with torch.inference_mode():  # detached: only the bytes count
        return hashlib.sha256(raw_bytes(tensor)).hexdigest()
