"""The fingerprint of a base model: one digest over its weights, whatever format they lie in.

It is the sha256 of the JSON list, sorted by Hugging Face name, of [name, safetensors name of the
type, shape, sha256 of the little-endian bytes]. A tied ``lm_head.weight`` is left out, so the value
is the same from a Hugging Face directory and from the Megatron checkpoint made of it.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.artifacts import sha256_json
from nemotron.errors import NemotronError
from nemotron.steps._formats.safetensors_file import raw_bytes
from nemotron.steps._formats.weights import DTYPE_NAMES, Weights, damaged

_NUM_THREADS = min(4, os.cpu_count() or 1)
_MAX_WAITING_BYTES = 32_000_000  # tensors that are held only because they are being hashed


class Fingerprint:
    """The fingerprint of weights that pass by one at a time, in any order.

    Hashing goes on in threads, behind the caller's back: sha256 is slower than any disk that is
    worth having. At most one large tensor, or 32 MB of smaller ones, waits.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, list[int], Future[str]]] = {}
        self._waiting: deque[tuple[int, Future[str]]] = deque()
        self._threads = ThreadPoolExecutor(_NUM_THREADS)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor, whose values stay as they are."""
        while self._waiting and sum(size for size, _ in self._waiting) > _MAX_WAITING_BYTES:
            self._waiting.popleft()[1].result()
        digest = self._threads.submit(_sha256, tensor)
        self._waiting.append((tensor.nbytes, digest))
        self._entries[name] = DTYPE_NAMES[tensor.dtype], list(tensor.shape), digest

    def hexdigest(self) -> str:
        """Return the fingerprint of the tensors taken in so far."""
        entries = sorted(self._entries.items())
        return sha256_json([[name, *kind, digest.result()] for name, (*kind, digest) in entries])


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


Compare = Callable[[Weights], Mapping[str, Any]]


def read_back(
    weights: Weights, fingerprint: str, *, where: Path, compare: Compare | None = None
) -> dict[str, Any]:
    """Read weights that were just written, once, and return what ``compare`` makes of them.

    Raises:
        NemotronError: ``artifact_damaged``: they are not those that were written; and what
            ``compare`` raises.
    """
    reread = FingerprintedWeights(weights)
    problem: NemotronError | None = None
    properties: dict[str, Any] = {}
    try:
        properties |= compare(reread) if compare else {}
    except NemotronError as error:
        problem = error
    if reread.fingerprint() != fingerprint:  # the cause, where both are wrong
        raise damaged(where, "the weights read back are not those that were written")
    if problem is not None:
        raise problem
    return properties


def base_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of a model's weights, reading one tensor at a time."""
    return FingerprintedWeights(weights).fingerprint()


def _sha256(tensor: Tensor) -> str:
    with torch.inference_mode():  # detached: only the bytes count
        return hashlib.sha256(raw_bytes(tensor)).hexdigest()
