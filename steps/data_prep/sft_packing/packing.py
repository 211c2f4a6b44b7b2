"""Packs documents into rows by one of five algorithms, none slower than n log n.

Lengths are those at training time: the last token of a document is only a label, so that a document
of L stored tokens takes L - 1 tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nemotron.steps.data_prep.sft_packing.best_fit import best_fit_decreasing
from nemotron.steps.data_prep.sft_packing.shuffle_fill import shuffle_fill

# Best fit is used instead of shuffle_fill if it saves more than this share of the rows.
_WORTH = 0.002


class Rows(NamedTuple):
    """Which documents make up which row.

    Attributes:
        documents: Document indices, row after row, int64.
        starts: Row i holds ``documents[starts[i]:starts[i + 1]]``, int64.
    """

    documents: np.ndarray
    starts: np.ndarray

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1


def pack(lengths: np.ndarray, *, capacity: int, algorithm: str, seed: int | list[int]) -> Rows:
    """Group documents into rows of at most ``capacity`` tokens.

    ``shuffle_fill`` mixes documents at random and needs about as few rows as possible; if
    ``best_fit_decreasing`` would save more than 0.2 % of the rows, its result is returned instead.
    ``best_fit_decreasing`` places the longest document first, each into the fullest row with room;
    rows of many short documents are left for the end. ``first_fit_shuffle`` takes the documents in
    random order and puts each into the first row with room; ``first_fit_decreasing`` does the same
    with the longest first. ``concatenative`` fills one row after another in the order of the input
    and never looks back (next fit). With all but ``concatenative`` the rows are shuffled, for
    trainers that read in order, and documents of equal length are exchanged at random.

    Args:
        lengths: Tokens of each document at training time, each in [1, capacity].
        capacity: Tokens of a row at training time.
        algorithm: One of the five names above.
        seed: Seed of the order; has no effect on ``concatenative``.

    Raises:
        ValueError: A document is empty or longer than ``capacity``, or the algorithm is unknown.

    Source: Johnson 1973. First fit uses a tree of the largest room per subtree, so that the first
    row with room is found in log2(rows) steps instead of a scan.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        got = f"{lengths.min()}..{lengths.max()}"
        raise ValueError(f"document lengths are {got}; wanted 1..{capacity}")
    random = np.random.default_rng(seed)
    if algorithm == "concatenative":
        return Rows(np.arange(len(lengths), dtype=np.int64), _next_fit(lengths, capacity))
    if algorithm == "shuffle_fill":
        filled = shuffle_fill(lengths, capacity=capacity, random=random)
        tightest = best_fit_decreasing(lengths, capacity=capacity)
        saves = len(filled[1]) - len(tightest[1]) > _WORTH * len(filled[1])
        return _assign(lengths, *(tightest if saves else filled), random)
    if algorithm == "best_fit_decreasing":
        return _assign(lengths, *best_fit_decreasing(lengths, capacity=capacity), random)
    if algorithm == "first_fit_shuffle":
        order = random.permutation(len(lengths))
    elif algorithm == "first_fit_decreasing":
        order = np.argsort(-lengths, kind="stable")
    else:
        raise ValueError(f"no packing algorithm {algorithm!r}")
    return _shuffle_rows(order, _first_fit(lengths[order], capacity), random)


def _assign(
    lengths: np.ndarray, row_lengths: np.ndarray, starts: np.ndarray, random: np.random.Generator
) -> Rows:
    """Return rows of documents, given rows of lengths: equal lengths and rows are shuffled."""
    order = random.permutation(len(lengths))
    by_length = order[np.argsort(lengths[order], kind="stable")]
    documents = np.empty(len(lengths), dtype=np.int64)
    documents[np.argsort(row_lengths, kind="stable")] = by_length
    row_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return _shuffle_rows(documents, row_of, random)


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        used = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, used + capacity, side="right")))
    return np.array(starts, dtype=np.int64)


def _first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each document, taken in order; the first row with room gets it."""
    # All rows but one are more than half full, which bounds their number.
    max_rows = 2 * (int(lengths.sum()) // capacity + 1)
    leaves = 1 << (max_rows - 1).bit_length()
    room = [capacity] * (2 * leaves)
    row_of = np.empty(len(lengths), dtype=np.int64)
    for index, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        row_of[index] = node - leaves
        room[node] -= length
        node //= 2
        while node:
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
            node //= 2
    return row_of


def _shuffle_rows(order: np.ndarray, row_of: np.ndarray, random: np.random.Generator) -> Rows:
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    place = random.permutation(num_rows)[row_of]
    sizes = np.bincount(place, minlength=num_rows)
    by_row = np.argsort(place, kind="stable")
    return Rows(order[by_row].astype(np.int64), np.append(0, np.cumsum(sizes)))
