"""Digests of weights, taken while the weights pass, and the fingerprint of a base model.

The fingerprint is one digest of the weights, independent of their format: the sha256 of a JSON list
of [Hugging Face name, safetensors' name of the type, shape, BLAKE3 of the little-endian bytes],
sorted by name. A tied ``lm_head.weight`` is left out, so that a Hugging Face directory and the
Megatron checkpoint made from it have the same fingerprint.

BLAKE3 is as strong as sha256 and five times as fast: one core hashes faster than any disk reads.

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
    """The interface that ``blake3`` shares with the digests of ``hashlib`` and ``xxhash``."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class TensorDigests:
    """Digests of tensors, which are added one at a time, in any order and from any thread.

    Args:
        algorithm: Makes a new digest.
    """

    def __init__(self, algorithm: Callable[[], Digest] = blake3) -> None:
        self._algorithm = algorithm
        self._entries: dict[str, TensorEntry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> str:
        """Return the hexadecimal digest of the bytes of a tensor that was added."""
        return self._entries[name][-1]

    def add(self, name: str, tensor: Tensor) -> None:
        """Add the digest of one tensor."""
        for _ in self.passing(name, [tensor]):
            pass

    def passing(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the blocks of one tensor; its digest is added once all have passed."""
        digest, kind, shape = self._algorithm(), "", [0]
        for block in blocks:
            digest.update(raw_bytes(block))
            kind = DTYPE_NAMES[block.dtype]
            shape = [shape[0] + len(block), *block.shape[1:]] if block.dim() else []
            yield block
        self._entries[name] = kind, shape, digest.hexdigest()

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return the entries of those of ``names`` that were added."""
        return {name: self._entries[name] for name in names if name in self._entries}

    def restore(self, entries: Mapping[str, TensorEntry]) -> None:
        """Add what ``entries`` returned, which may have been through JSON since."""
        for name, (kind, shape, digest) in entries.items():
            self._entries[name] = kind, shape, digest

    def first_difference(self, other: TensorDigests) -> str | None:
        """Return the first name, in sorted order, whose entries differ; None if there is none."""
        names = sorted(self._entries.keys() | other._entries.keys())
        return next((n for n in names if self._entries.get(n) != other._entries.get(n)), None)

    def fingerprint(self) -> str:
        """Return the fingerprint of the tensors added so far; their digests must be BLAKE3."""
        return sha256_json([[name, *self._entries[name]] for name in sorted(self._entries)])


class DigestedWeights:
    """Weights whose digests are taken while they are read; see ``Weights``.

    Attributes:
        digests: Digests of the tensors that were read to their end.
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
        """Return the digests of all tensors; those that were not read yet are read now."""
        unread = [name for name in self.names if name not in self.digests]
        # Each thread gets consecutive names, since consecutive tensors lie close to each other.
        size = -(-len(unread) // NUM_AT_A_TIME) or 1
        parts = [unread[start : start + size] for start in range(0, len(unread), size)]
        in_threads(self._pass_all, parts, num_threads=NUM_AT_A_TIME)
        return self.digests

    def _pass_all(self, names: Sequence[str]) -> None:
        for name in names:
            for _ in self.blocks(name):
                pass


class FingerprintedWeights:
    """Weights whose fingerprint is known, or taken while they are read; see ``Weights``."""

    def __init__(self, weights: Weights, known: str | None = None) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self._known = known
        self._digested = DigestedWeights(weights)
        source = weights if known is not None else self._digested
        self.read, self.blocks = source.read, source.blocks

    def fingerprint(self) -> str:
        """Return the fingerprint, if necessary by reading the tensors that were not read yet."""
        return self._known or self._digested.all_digests().fingerprint()


def base_fingerprint(weights: Weights) -> str:
    """Return the fingerprint of a model's weights, reading one tensor at a time."""
    return FingerprintedWeights(weights).fingerprint()
