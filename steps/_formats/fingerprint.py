"""Digests of weights, taken while they pass, and the fingerprint of a base model made of them.

The fingerprint is one digest over the weights, whatever format they lie in.

It is the sha256 of the JSON list, sorted by Hugging Face name, of [name, safetensors name of the
type, shape, BLAKE3 of the little-endian bytes]. A tied ``lm_head.weight`` is left out, so the value
is the same from a Hugging Face directory and from the Megatron checkpoint made of it.

BLAKE3 is as strong as sha256 and five times as fast: one core hashes more than any disk reads.

Source: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from blake3 import blake3
from torch import Tensor

from nemotron.artifacts import sha256_json
from nemotron.steps._formats.safetensors_file import raw_bytes
from nemotron.steps._formats.threads import NUM_AT_A_TIME, in_threads
from nemotron.steps._formats.weights import DTYPE_NAMES, Weights

TensorEntry = tuple[str, list[int], str]  # name of the type, shape, digest of the bytes


class Digest(Protocol):
    """What ``blake3`` and the classes of ``hashlib`` and ``xxhash`` return."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class TensorDigests:
    """Digests of tensors that pass by one at a time, in any order, from any thread.

    Args:
        algorithm: Makes the digest of a tensor.
    """

    def __init__(self, algorithm: Callable[[], Digest] = blake3) -> None:
        self._algorithm = algorithm
        self._entries: dict[str, TensorEntry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> str:
        """Return the hexadecimal digest of the bytes of a tensor that was taken in."""
        return self._entries[name][-1]

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor."""
        for _ in self.passing(name, [tensor]):
            pass

    def passing(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the blocks of one tensor, which is taken in once all have passed."""
        digest, kind, shape = self._algorithm(), "", [0]
        for block in blocks:
            digest.update(raw_bytes(block))
            kind = DTYPE_NAMES[block.dtype]
            shape = [shape[0] + len(block), *block.shape[1:]] if block.dim() else []
            yield block
        self._entries[name] = kind, shape, digest.hexdigest()

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return what is known of those of ``names`` that were taken in."""
        return {name: self._entries[name] for name in names if name in self._entries}

    def restore(self, entries: Mapping[str, TensorEntry]) -> None:
        """Take in what ``entries`` said of tensors, also after a way through JSON."""
        for name, (kind, shape, digest) in entries.items():
            self._entries[name] = kind, shape, digest

    def first_difference(self, other: TensorDigests) -> str | None:
        """Return the first name, in their order, of which the two took in something else."""
        names = sorted(self._entries.keys() | other._entries.keys())
        return next((n for n in names if self._entries.get(n) != other._entries.get(n)), None)

    def fingerprint(self) -> str:
        """Return the fingerprint of the tensors taken in so far, by BLAKE3."""
        return sha256_json([[name, *self._entries[name]] for name in sorted(self._entries)])


class DigestedWeights:
    """Weights whose digests are taken while somebody reads them; see ``Weights``.

    Attributes:
        digests: Of the tensors that were read to their end.
    """

    def __init__(self, weights: Weights, algorithm: Callable[[], Digest] = blake3) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self.digests = TensorDigests(algorithm)
        self._weights = weights

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        if name not in self.digests:
            self.digests.add(name, tensor)
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        blocks = self._weights.blocks(name)
        if name in self.digests:
            return blocks
        return self.digests.passing(name, blocks)

    def all_digests(self) -> TensorDigests:
        """Return the digests of all tensors, after reading what nobody has."""
        unread = [name for name in self.names if name not in self.digests]
        size = -(-len(unread) // NUM_AT_A_TIME) or 1  # in one piece: neighbours lie together
        parts = [unread[start : start + size] for start in range(0, len(unread), size)]
        in_threads(self._pass_all, parts, num_threads=NUM_AT_A_TIME)
        return self.digests

    def _pass_all(self, names: Sequence[str]) -> None:
        for name in names:
            for _ in self.blocks(name):
                pass


class FingerprintedWeights:
    """Weights whose fingerprint is known, or taken while somebody reads them; see ``Weights``."""

    def __init__(self, weights: Weights, known: str | None = None) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self._known = known
        self._digested = DigestedWeights(weights)
        source = weights if known is not None else self._digested
        self.read, self.blocks = source.read, source.blocks

    def fingerprint(self) -> str:
        """Return the fingerprint; what nobody has read is read for it."""
        return self._known or self._digested.all_digests().fingerprint()


def base_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of a model's weights, reading one tensor at a time."""
    return FingerprintedWeights(weights).fingerprint()
