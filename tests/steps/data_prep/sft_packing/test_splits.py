"""Splits: exact counts, duplicates together, the same for the same content."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.splits import split_counts, split_documents

RATIOS = {"train": 0.98, "valid": 0.01, "test": 0.01}
uids_of = st.lists(st.integers(0, 2**64 - 1), min_size=100, max_size=400, unique=True)


@given(uids=uids_of)
def test_split_documents_is_exact_within_one_document(uids: list[int]) -> None:
    splits = split_documents(np.array(uids, dtype=np.uint64), RATIOS)
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(len(uids)))
    for name, ratio in RATIOS.items():
        assert abs(len(splits[name]) - len(uids) * ratio) < 1


def test_split_documents_gives_a_thousand_documents_980_10_10() -> None:
    uids = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    counts = {name: len(chosen) for name, chosen in split_documents(uids, RATIOS).items()}
    assert counts == {"train": 980, "valid": 10, "test": 10}


@given(
    uids=st.lists(st.integers(0, 30), min_size=60, max_size=120),
    order=st.randoms(use_true_random=False),
)
def test_split_documents_keeps_duplicates_together_whatever_the_order(
    uids: list[int], order: object
) -> None:
    ratios = {"train": 0.8, "valid": 0.1, "test": 0.1}
    assume(len(set(uids)) >= 20)  # so that some groups are small enough for a small split
    splits = split_documents(np.array(uids, dtype=np.uint64), ratios)
    held = {name: {uids[index] for index in chosen} for name, chosen in splits.items()}
    assert not held["train"] & held["valid"]
    assert not held["train"] & held["test"]
    assert not held["valid"] & held["test"]
    backwards = split_documents(np.array(uids[::-1], dtype=np.uint64), ratios)
    assert {name: {uids[::-1][i] for i in chosen} for name, chosen in backwards.items()} == held


def test_split_documents_fills_the_small_splits_around_a_large_group_of_duplicates() -> None:
    uids = np.array([0] * 50 + list(range(1, 51)), dtype=np.uint64)
    splits = split_documents(uids, {"train": 0.8, "valid": 0.1, "test": 0.1})
    assert {name: len(chosen) for name, chosen in splits.items()} == {
        "train": 80,
        "valid": 10,
        "test": 10,
    }


def test_split_documents_leaves_out_a_split_of_ratio_zero() -> None:
    splits = split_documents(np.arange(10, dtype=np.uint64), {"train": 1.0, "valid": 0.0})
    assert list(splits) == ["train"]


def test_split_documents_refuses_an_empty_split_by_name() -> None:
    with pytest.raises(NemotronError, match="test would be empty") as caught:
        split_documents(np.zeros(9, dtype=np.uint64), {"train": 0.9, "test": 0.1})
    assert caught.value.code == "empty_split"


def test_split_counts_never_rounds_a_split_to_nothing() -> None:
    assert split_counts(30, RATIOS) == {"train": 28, "valid": 1, "test": 1}
