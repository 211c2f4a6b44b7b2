"""Many tokenized documents as a few arrays, and which of them a blend keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nemotron.steps.data_prep.sft_packing.masks import TRUNCATIONS, Document


@dataclass(frozen=True)
class Documents:
    """Tokenized documents of one data set, in the order of its rows.

    Attributes:
        ids: Token ids of all documents, int32.
        mask: 1 where a token is trained, uint8; not shifted.
        offsets: Document i is ``ids[offsets[i]:offsets[i + 1]]``, int64.
        uids: Content hash of each document, uint64.
        truncated: How each document was cut: index into ``TRUNCATIONS``, uint8.
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    uids: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def runtime_lengths(self) -> np.ndarray:
        """Tokens of each document at training time: the last one is only ever a label."""
        return np.diff(self.offsets) - 1

    @property
    def truncation_counts(self) -> dict[str, int]:
        """Documents that were cut, by how."""
        counts = np.bincount(self.truncated, minlength=len(TRUNCATIONS)).tolist()
        named = zip(TRUNCATIONS, counts, strict=True)
        return {how: count for how, count in named if how and count}

    @property
    def supervised_tokens(self) -> np.ndarray:
        """Tokens of each document with a loss: a trained first token has nothing to come from."""
        starts = self.offsets[:-1]
        if len(starts) == 0:
            return np.empty(0, np.int64)
        return np.add.reduceat(self.mask, starts, dtype=np.int64) - self.mask[starts]

    def take(self, chosen: np.ndarray) -> Documents:
        """Return the documents with these indices."""
        tokens = token_indices(self.offsets, chosen)
        lengths = np.diff(self.offsets)[chosen]
        return Documents(
            ids=self.ids[tokens],
            mask=self.mask[tokens],
            offsets=np.append(0, np.cumsum(lengths)),
            uids=self.uids[chosen],
            truncated=self.truncated[chosen],
        )


@dataclass
class DocumentsBuilder:
    """Collects documents one by one."""

    ids: list[np.ndarray] = field(default_factory=list)
    mask: list[np.ndarray] = field(default_factory=list)
    uids: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)

    def add(self, document: Document, *, uid: int) -> None:
        """Append one document."""
        self.ids.append(document.ids)
        self.mask.append(document.mask)
        self.uids.append(uid)
        self.truncated.append(TRUNCATIONS.index(document.truncated))

    def build(self) -> Documents:
        """Return what was collected."""
        lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)
        return Documents(
            ids=np.concatenate([np.empty(0, np.int32), *self.ids]),
            mask=np.concatenate([np.empty(0, np.uint8), *self.mask]),
            offsets=np.append(0, np.cumsum(lengths)),
            uids=np.array(self.uids, dtype=np.uint64),
            truncated=np.array(self.truncated, dtype=np.uint8),
        )


def concatenate(parts: Sequence[Documents]) -> Documents:
    """Return the documents of all parts, one part after the other."""
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    return Documents(
        ids=np.concatenate([part.ids for part in parts]),
        mask=np.concatenate([part.mask for part in parts]),
        offsets=np.append(0, np.cumsum(lengths)),
        uids=np.concatenate([part.uids for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
    )


def token_indices(offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the indices of all tokens of the chosen documents, in the order of ``chosen``."""
    starts, lengths = offsets[chosen], np.diff(offsets)[chosen]
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(len(shift), dtype=np.int64) + shift


def smallest_hashes(uids: np.ndarray, count: int, *, seed: int | None = None) -> np.ndarray:
    """Return the indices of the ``count`` documents with the smallest hashes, ascending.

    The choice depends on what the documents say and on nothing else, and a larger count is a
    superset of a smaller one. With a seed, the hashes are hashed once more together with it.
    """
    keys = uids
    if seed is not None:
        keys = np.array([_rehash(uid, seed) for uid in uids.tolist()], dtype=np.uint64)
    return np.sort(np.argsort(keys, kind="stable")[:count])


def blend_counts(available: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many documents of each data set a blend takes.

    Equal weights keep every document. Otherwise weights are relative numbers of documents: the data
    set that is scarcest for its weight is taken whole and the others in proportion; none is
    repeated.

    Args:
        available: Documents of each data set, each at least 1.
        weights: Positive weight of each data set.
    """
    if len(set(weights)) == 1:
        return list(available)
    scale = min(count / weight for count, weight in zip(available, weights, strict=True))
    return [max(1, round(weight * scale)) for weight in weights]


def _rehash(uid: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
