"""Best-fit decreasing over the histogram of lengths: its cost grows with the distinct lengths."""

from __future__ import annotations

import numpy as np


class _Rows:
    """``count`` equal rows: each has the content of ``before``, and ``copies`` of ``length``."""

    __slots__ = ("before", "copies", "count", "length")

    def __init__(self, count: int, before: _Rows | None, length: int, copies: int) -> None:
        self.count = count
        self.before = before
        self.length = length
        self.copies = copies


def best_fit_decreasing(lengths: np.ndarray, *, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of documents as (lengths row after row, where each row starts).

    Documents are placed longest first, each into the fullest row that has room for it. Those of one
    length are placed together: the fullest rows with room take as many as fit. Rows that are equal
    are treated as one group.

    Args:
        lengths: Tokens of each document, each in [1, capacity].
        capacity: Tokens of a row.

    Source: Johnson 1973; on a histogram as in Krell et al. 2021 (arXiv:2107.02027).
    """
    histogram = np.bincount(lengths, minlength=capacity + 1)
    by_room: list[list[_Rows]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: there are rows with room r
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = rooms >> length
            if not fitting:
                rooms = _open(by_room, rooms, capacity, length, left)
                break
            room = length + (fitting & -fitting).bit_length() - 1
            group = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            copies = room // length
            full = min(group.count, left // copies)
            left -= full * copies
            rest = left if full < group.count else 0
            left -= rest
            for count, number in (
                (full, copies),
                (1 if rest else 0, rest),
                (group.count - full - (1 if rest else 0), 0),
            ):
                rooms = _add(by_room, rooms, room, group, count, length, number)
    return _expand([group for groups in by_room for group in groups])


def _open(by_room: list[list[_Rows]], rooms: int, capacity: int, length: int, left: int) -> int:
    copies = capacity // length
    full, rest = divmod(left, copies)
    rooms = _add(by_room, rooms, capacity, None, full, length, copies)
    return _add(by_room, rooms, capacity, None, 1, length, rest) if rest else rooms


def _add(
    by_room: list[list[_Rows]],
    rooms: int,
    room: int,
    before: _Rows | None,
    count: int,
    length: int,
    copies: int,
) -> int:
    """Add ``copies`` documents to each of ``count`` rows, and file them under the room left."""
    if count == 0 or (copies == 0 and before is None):
        return rooms
    if copies == 0 and before is not None:
        rest = _Rows(count, before.before, before.length, before.copies)
    else:
        rest = _Rows(count, before, length, copies)
    by_room[room - copies * length].append(rest)
    return rooms | 1 << (room - copies * length)


def _expand(groups: list[_Rows]) -> tuple[np.ndarray, np.ndarray]:
    parts: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for group in groups:
        content: list[int] = []
        node: _Rows | None = group
        while node is not None:
            content += [node.length] * node.copies
            node = node.before
        parts.append(np.tile(np.array(content[::-1], dtype=np.int64), group.count))
        sizes.append(np.full(group.count, len(content), dtype=np.int64))
    none = np.empty(0, dtype=np.int64)
    starts = np.append(0, np.cumsum(np.concatenate([none, *sizes])))
    return np.concatenate([none, *parts]), starts
