"""Packing that needs close to the fewest rows possible and mixes documents almost at random."""

from __future__ import annotations

import numpy as np


def shuffle_fill(
    lengths: np.ndarray, *, capacity: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of documents as (lengths row after row, where each row starts).

    A row starts with a random document; those longer than half a row come first, since no two of
    them fit into one. Random documents follow as long as each takes at most half of the room that
    is left, or all of it. Then the largest document that fits is added until none fits. In this way
    small documents are used up evenly, and the last rows are as mixed as the first.

    O(n) steps, each of which looks up the largest remaining length in a bitmap of ``capacity``
    bits.

    Args:
        lengths: Tokens of each document, each in [1, capacity].
        capacity: Tokens of a row.
        random: Decides the order.
    """
    shuffled = lengths[random.permutation(len(lengths))]
    is_large = shuffled > capacity // 2
    left = _Left(np.concatenate([shuffled[is_large], shuffled[~is_large]]), capacity)
    small = int(is_large.sum())
    rows: list[int] = []
    starts = [0]
    for seed in left.queue[:small]:
        left.use(seed)
        left.fill(rows, seed, capacity, small)
        starts.append(len(rows))
    while left.skip_taken(small):
        left.fill(rows, left.take_next(), capacity, small)
        starts.append(len(rows))
    return np.array(rows, dtype=np.int64), np.array(starts, dtype=np.int64)


class _Left:
    """The documents that no row has yet, by length."""

    def __init__(self, queue: np.ndarray, capacity: int) -> None:
        self.queue: list[int] = queue.tolist()
        self._counts: list[int] = np.bincount(queue, minlength=capacity + 1).tolist()
        self._lengths = _bitmap(self._counts)
        # Documents that were taken out of turn to fill a row; the queue still has them.
        self._taken = [0] * (capacity + 1)
        self._next = 0

    def use(self, length: int) -> None:
        """Count one document of a length as used."""
        self._counts[length] -= 1
        if not self._counts[length]:
            self._lengths ^= 1 << length

    def skip_taken(self, first: int) -> bool:
        """Go to the next document of the queue, from ``first``, that is left; False at its end."""
        place = max(self._next, first)
        queue, taken = self.queue, self._taken
        while place < len(queue) and taken[queue[place]]:
            taken[queue[place]] -= 1
            place += 1
        self._next = place
        return place < len(queue)

    def take_next(self) -> int:
        """Use the document that ``skip_taken`` went to."""
        length = self.queue[self._next]
        self._next += 1
        self.use(length)
        return length

    def fill(self, rows: list[int], seed: int, capacity: int, first: int) -> None:
        """Append a row that starts with ``seed``."""
        rows.append(seed)
        room = capacity - seed
        while room and self.skip_taken(first):
            length = self.queue[self._next]
            if 2 * length > room and length != room:
                break
            rows.append(self.take_next())
            room -= length
        while room:
            length = (self._lengths & ((2 << room) - 1)).bit_length() - 1
            if length < 1:
                return
            rows.append(length)
            self._taken[length] += 1
            self.use(length)
            room -= length


def _bitmap(counts: list[int]) -> int:
    """Return an integer whose bit i says whether ``counts[i]`` is above 0."""
    bits = np.packbits(np.array(counts) > 0, bitorder="little")
    return int.from_bytes(bits.tobytes(), "little")
