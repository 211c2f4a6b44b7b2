"""Many tokenized documents as a few flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Tokenized documents.

    Attributes:
        ids: Token ids of all documents, int32.
        mask: 1 where a token is trained, uint8; not shifted.
        offsets: Document i is ``ids[offsets[i]:offsets[i + 1]]``, int64.
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Stored tokens of each document."""
        return np.diff(self.offsets)

    @property
    def runtime_lengths(self) -> np.ndarray:
        """Tokens of each document at training time: the last one is only ever a label."""
        return self.lengths - 1

    @property
    def supervised_tokens(self) -> np.ndarray:
        """Tokens of each document with a loss: a trained first token has nothing to come from."""
        starts = self.offsets[:-1]
        if len(starts) == 0:
            return np.empty(0, np.int64)
        return np.add.reduceat(self.mask, starts, dtype=np.int64) - self.mask[starts]

    def padded(self, multiple: int, *, pad_id: int) -> Documents:
        """Return the documents with runtime lengths that are multiples of ``multiple``.

        Context and sequence parallelism cut every document into equal parts. The padding is at the
        end of each document and never trained.
        """
        if multiple == 1:
            return self
        lengths = self.lengths
        padded = 1 + -(-(lengths - 1) // multiple) * multiple
        offsets = np.append(0, np.cumsum(padded))
        places = ranges(offsets[:-1], lengths)
        ids = np.full(offsets[-1], pad_id, dtype=np.int32)
        mask = np.zeros(offsets[-1], dtype=np.uint8)
        ids[places], mask[places] = self.ids, self.mask
        return Documents(ids, mask, offsets)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``starts[i], starts[i] + 1, ...`` (``lengths[i]`` of them) for every i, joined."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(len(shift), dtype=np.int64) + shift
