"""What becomes of documents longer than a row: cut at a turn, cut anywhere, dropped, or split."""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

LongDocuments = Literal["truncate_turn", "truncate", "drop", "split", "error"]


class Fitted(NamedTuple):
    """Documents that fit, as ranges of the tokens they were made of.

    Attributes:
        starts: First token of each, int64.
        lengths: Stored tokens of each, int64.
        origins: Index of the document each was made of, int64, ascending.
        counts: Documents that were cut or split, by how, and tokens that were left out.
    """

    starts: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray
    counts: Counter[str]


def survives(
    lengths: np.ndarray, first_trained: np.ndarray, *, policy: LongDocuments, max_tokens: int
) -> np.ndarray:
    """Return which documents leave something to train on, without looking at their tokens.

    Args:
        lengths: Stored tokens of each.
        first_trained: Index of the first label of each.
        policy: What becomes of those longer than ``max_tokens``.
        max_tokens: Most stored tokens.
    """
    if policy == "split":
        return np.ones(len(lengths), dtype=bool)
    fits = lengths <= max_tokens
    return fits if policy in ("drop", "error") else fits | (first_trained < max_tokens)


def fit(
    tokens: np.ndarray,
    offsets: np.ndarray,
    *,
    policy: LongDocuments,
    max_tokens: int,
    stop_token_id: int | None,
) -> Fitted:
    """Return documents of at most ``max_tokens``, each with something to train on.

    ``truncate_turn`` ends a document with the last turn of the assistant that fits whole; if not
    even the first turn fits, it ends within that turn, as ``truncate`` always does. A cut adds no
    end-of-turn token, since there was none. ``split`` makes further documents of the rest, as many
    as needed, but leaves out parts without anything to train on.

    Args:
        tokens: int32, complemented where trained; only of documents that ``survives`` kept.
        offsets: Document i is ``tokens[offsets[i]:offsets[i + 1]]``.
        policy: As named.
        max_tokens: Most stored tokens, at least 2.
        stop_token_id: The token that ends a turn, or None.
    """
    lengths = np.diff(offsets)
    counts: Counter[str] = Counter()
    long = np.flatnonzero(lengths > max_tokens)
    if len(long) == 0:
        return Fitted(offsets[:-1], lengths, np.arange(len(lengths)), counts)
    pieces: list[list[tuple[int, int]]] = []
    for number in long.tolist():
        start, stop = int(offsets[number]), int(offsets[number + 1])
        found = _pieces(tokens[start:stop], policy, max_tokens, stop_token_id, counts)
        pieces.append([(start + begin, end - begin) for begin, end in found])
        counts["tokens_cut"] += stop - start - sum(end - begin for begin, end in found)
    repeats = np.ones(len(lengths), dtype=np.int64)
    repeats[long] = [len(found) for found in pieces]
    origins = np.repeat(np.arange(len(lengths)), repeats)
    starts, fitted = offsets[origins], lengths[origins]
    where = np.isin(origins, long)
    flat = np.array([piece for found in pieces for piece in found], dtype=np.int64).reshape(-1, 2)
    starts[where], fitted[where] = flat[:, 0], flat[:, 1]
    return Fitted(starts, fitted, origins, counts)


def _pieces(
    tokens: np.ndarray,
    policy: LongDocuments,
    max_tokens: int,
    stop_token_id: int | None,
    counts: Counter[str],
) -> list[tuple[int, int]]:
    """Return (start, stop) of what is kept of one long document."""
    trained = tokens < 0
    is_end = trained & ~np.append(trained[1:], False)
    if stop_token_id is not None:
        is_end &= tokens == ~stop_token_id
    if policy != "split":
        end, is_whole = _cut(trained, is_end, 0, max_tokens, whole_turns=policy == "truncate_turn")
        counts["truncate_turn" if is_whole else "truncate"] += 1
        return [(0, end)]
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < len(tokens):
        if not trained[start + 1 : start + max_tokens].any():
            # Nothing to train on within reach: continue shortly before the next trained token.
            later = np.flatnonzero(trained[start + max_tokens :])
            if len(later) == 0:
                break
            start = start + max_tokens + int(later[0]) - max_tokens // 2
            continue
        end, is_whole = _cut(trained, is_end, start, max_tokens, whole_turns=True)
        pieces.append((start, end))
        # A label needs a token before it, so after a cut within a turn both pieces have that token.
        start = end if is_whole or end == len(tokens) else end - 1
    counts["split"] += 1
    return pieces


def _cut(
    trained: np.ndarray, is_end: np.ndarray, start: int, max_tokens: int, *, whole_turns: bool
) -> tuple[int, bool]:
    """Return where a document that begins at ``start`` ends, and whether that is a turn's end."""
    stop = min(start + max_tokens, len(trained))
    ends = start + 1 + np.flatnonzero(is_end[start + 1 : stop]) if whole_turns else trained[:0]
    if len(ends):
        return int(ends[-1]) + 1, True
    return start + 2 + int(np.flatnonzero(trained[start + 1 : stop])[-1]), False
