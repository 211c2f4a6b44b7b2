"""Long documents: each policy, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps.data_prep.sft_packing.long_documents import Fitted, LongDocuments, fit, survives

STOP = 9
POLICIES: tuple[LongDocuments, ...] = ("truncate_turn", "truncate", "drop", "split")


def tokens_of(mask: list[int]) -> np.ndarray:
    """Token ids 100, 101, ...; complemented where trained; a turn ends with STOP."""
    ids = np.arange(len(mask), dtype=np.int32) + 100
    flags = np.array(mask, dtype=bool)
    ends = flags & ~np.append(flags[1:], False)
    return np.where(flags, ~np.where(ends, STOP, ids), ids)


def fitted(documents: list[list[int]], policy: LongDocuments, max_tokens: int) -> Fitted:
    offsets = np.append(0, np.cumsum([len(mask) for mask in documents], dtype=np.int64))
    tokens = np.concatenate([np.empty(0, np.int32), *map(tokens_of, documents)])
    return fit(tokens, offsets, policy=policy, max_tokens=max_tokens, stop_token_id=STOP)


@pytest.mark.parametrize(
    ("mask", "max_tokens", "policy", "pieces"),
    [
        ([0, 1, 1, 0, 0, 1, 1], 7, "truncate_turn", [(0, 7)]),
        ([0, 1, 1, 0, 0, 1, 1], 6, "truncate_turn", [(0, 3)]),
        ([0, 1, 1, 0, 0, 1, 1], 6, "truncate", [(0, 6)]),
        ([0, 1, 1, 0, 0, 1, 1], 4, "truncate", [(0, 3)]),
        ([0, 0, 0, 1, 1, 1, 1], 5, "truncate_turn", [(0, 5)]),
        ([0, 1, 1, 0, 0, 1, 1], 4, "split", [(0, 3), (3, 4)]),
        ([0, 1, 1, 1, 1, 1, 1], 3, "split", [(0, 3), (2, 3), (4, 3)]),
        ([0, 1, 1, *[0] * 7, 1, 1], 4, "split", [(0, 3), (8, 4)]),
    ],
)
def test_fit_cuts_where_the_policy_says(
    mask: list[int], max_tokens: int, policy: LongDocuments, pieces: list[tuple[int, int]]
) -> None:
    found = fitted([mask], policy, max_tokens)
    assert list(zip(found.starts.tolist(), found.lengths.tolist(), strict=True)) == pieces


masks = st.lists(st.integers(0, 1), min_size=2, max_size=40)


@pytest.mark.parametrize("policy", POLICIES)
@given(documents=st.lists(masks, max_size=6), max_tokens=st.integers(2, 12))
def test_what_fits_is_short_enough_and_trains_something(
    policy: LongDocuments, documents: list[list[int]], max_tokens: int
) -> None:
    # As the first stage leaves them: a label somewhere, and the last token is one.
    trained = [[*mask, 1] for mask in documents]
    lengths = np.array([len(mask) for mask in trained], dtype=np.int64)
    first = np.array([1 + mask[1:].index(1) for mask in trained], dtype=np.int64)
    alive = survives(lengths, first, policy=policy, max_tokens=max_tokens)
    left = [mask for mask, is_alive in zip(trained, alive, strict=True) if is_alive]
    found = fitted(left, policy, max_tokens)
    tokens = np.concatenate([np.empty(0, np.int32), *map(tokens_of, left)])
    labels: set[int] = set()
    for start, length in zip(found.starts.tolist(), found.lengths.tolist(), strict=True):
        assert 2 <= length <= max_tokens
        own = set((start + 1 + np.flatnonzero(tokens[start + 1 : start + length] < 0)).tolist())
        assert own
        assert not own & labels
        labels |= own
    assert sorted(set(found.origins.tolist())) == list(range(len(left)))
    if policy == "split":  # no label is lost, but for the first token of a document
        firsts = np.cumsum(lengths[alive]) - lengths[alive]
        assert labels == set(np.flatnonzero(tokens < 0).tolist()) - set(firsts.tolist())
    cut = len(tokens) - int(found.lengths.sum())
    assert found.counts["tokens_cut"] == cut
