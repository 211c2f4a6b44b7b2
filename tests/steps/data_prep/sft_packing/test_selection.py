"""Choosing documents: by what they say, in the numbers that a blend asks for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps.data_prep.sft_packing.selection import blend_targets, smallest_hashes


@given(st.lists(st.integers(0, 2**64 - 1), min_size=4, unique=True), st.integers(0, 5))
def test_smallest_hashes_of_a_larger_count_hold_those_of_a_smaller(
    values: list[int], seed: int
) -> None:
    uids = np.array(values, dtype=np.uint64)
    few, many = (set(smallest_hashes(uids, count, seed=seed).tolist()) for count in (2, 4))
    assert (len(few), len(many)) == (2, 4)
    assert few < many


def test_smallest_hashes_depend_on_the_seed() -> None:
    uids = np.arange(1000, dtype=np.uint64)
    assert smallest_hashes(uids, 10, seed=1).tolist() != smallest_hashes(uids, 10, seed=2).tolist()


@pytest.mark.parametrize(
    ("available", "weights", "wanted"),
    [
        ([100, 7], [1.0, 1.0], [100, 7]),
        ([100, 100], [0.9, 0.1], [100, 100 / 9]),
        ([100, 10], [3.0, 1.0], [30, 10]),
    ],
)
def test_blend_targets_take_the_scarcest_whole_and_the_others_in_proportion(
    available: list[int], weights: list[float], wanted: list[float]
) -> None:
    assert blend_targets(available, weights) == pytest.approx(wanted)
