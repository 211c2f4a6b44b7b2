"""Many tokenized documents as a few flat arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Tokenized documents.

    Attributes:
        tokens: Token ids, int32, a trained one as its complement (``~id``).
        starts: Index of each document's first token, int64.
        lengths: Stored tokens of each document, int64.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def runtime_lengths(self) -> np.ndarray:
        """Tokens of each document at training time: the last one is only ever a label."""
        return self.lengths - 1

    @cached_property
    def supervised_tokens(self) -> np.ndarray:
        """Tokens of each document with a loss; the first token has none: nothing precedes it."""
        trained = self.tokens < 0
        bounds = zip((self.starts + 1).tolist(), (self.starts + self.lengths).tolist(), strict=True)
        counts = [np.count_nonzero(trained[start:stop]) for start, stop in bounds]
        return np.array(counts, dtype=np.int64)

    def padded(self, multiple: int, *, pad_id: int) -> Documents:
        """Return the documents with runtime lengths that are multiples of ``multiple``.

        Context and sequence parallelism cut every document into equal parts. The padding goes to
        the end of each document and is not trained.
        """
        if multiple == 1:
            return self
        lengths = 1 + -(-self.runtime_lengths // multiple) * multiple
        starts = np.cumsum(lengths) - lengths
        tokens = np.full(int(lengths.sum()), pad_id, dtype=np.int32)
        tokens[ranges(starts, self.lengths)] = self.tokens[ranges(self.starts, self.lengths)]
        return Documents(tokens, starts, lengths)

    def joined(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens of some documents, one after the other."""
        starts = self.starts[numbers]
        bounds = zip(starts.tolist(), (starts + self.lengths[numbers]).tolist(), strict=True)
        return np.concatenate([self.tokens[start:stop] for start, stop in bounds])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``starts[i], starts[i] + 1, ...`` (``lengths[i]`` of them) for every i, joined."""
    ends = np.cumsum(lengths)
    shift = np.repeat(starts - (ends - lengths), lengths)
    return np.arange(len(shift), dtype=np.int64) + shift
