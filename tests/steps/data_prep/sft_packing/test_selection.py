"""Choosing documents: by what they say, in the numbers that a blend asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.blend import Dataset, WeightBy
from nemotron.steps.data_prep.sft_packing.selection import (
    Conversations,
    Selection,
    blend,
    blend_targets,
    smallest_hashes,
    take_usable,
)
from nemotron.steps.data_prep.sft_packing.splits import SPLITS


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


def conversations(uids: list[int], datasets: list[int], tokens: list[int]) -> Conversations:
    count = len(uids)
    return Conversations(
        uids=np.array(uids, dtype=np.uint64),
        datasets=np.array(datasets, dtype=np.int32),
        spools=np.zeros(count, dtype=np.int32),
        positions=np.arange(count, dtype=np.uint32),
        rows=np.arange(count, dtype=np.uint32),
        tokens=np.array(tokens, dtype=np.int64),
        survives=np.ones(count, dtype=bool),
    )


def chosen(
    found: Conversations, datasets: list[Dataset], weight_by: WeightBy = "rows"
) -> Selection:
    taken = take_usable(found, datasets, sample=None, sample_seed=0)
    ratios = {"train": 0.8, "valid": 0.1, "test": 0.1}
    return blend(found, taken, datasets, weight_by=weight_by, ratios=ratios)


def source(name: str, **values: Any) -> Dataset:
    return Dataset.model_validate({"name": name, "path": name} | values)


sizes = st.lists(st.integers(1, 400), min_size=30, max_size=80)


@given(first=sizes, second=sizes, weight=st.integers(1, 9), seed=st.integers(0, 99))
@example(first=[1] * 18 + [10] + [1] * 11, second=[1] * 41, weight=1, seed=1)
def test_weights_by_tokens_are_realised_within_one_conversation(
    first: list[int], second: list[int], weight: int, seed: int
) -> None:
    count = len(first) + len(second)
    uids = np.random.default_rng(seed).permutation(count).tolist()
    of_dataset = [0] * len(first) + [1] * len(second)
    found = conversations(uids, of_dataset, first + second)
    datasets = [source("a", weight=weight), source("b", weight=10 - weight)]
    copies = chosen(found, datasets, "tokens").copies
    tokens = [int((found.tokens * copies)[found.datasets == number].sum()) for number in (0, 1)]
    if weight == 5:  # equal weights keep everything
        assert tokens == [sum(first), sum(second)]
        return
    scale = min(sum(first) / weight, sum(second) / (10 - weight))
    wanted = (weight * scale, (10 - weight) * scale)
    for number, lengths in enumerate((first, second)):
        # A data set keeps one conversation in any case, where none would be nearer too.
        is_least = copies[found.datasets == number].sum() == 1
        furthest = max(lengths) if is_least else max(lengths) / 2
        assert abs(tokens[number] - wanted[number]) <= furthest + 1e-6


def test_a_repeat_acts_on_the_train_split_alone_and_by_hash() -> None:
    found = conversations(list(range(100)), [0] * 100, [1] * 100)
    selection = chosen(found, [source("a", repeat=2.5)])
    counts = {
        name: selection.copies[selection.of_split(name)].tolist()
        for name in ("train", "valid", "test")
    }
    assert set(counts["train"]) == {2, 3}
    assert counts["valid"] == counts["test"] == [1] * 10
    more = chosen(found, [source("a", repeat=2.7)])
    assert (more.copies >= selection.copies).all()
    assert more.copies.sum() > selection.copies.sum()


def test_a_listed_split_is_not_empty_because_others_hold_its_data_out() -> None:
    datasets = [
        source(name).model_copy(update={"into": name}) for name in ("train", "valid", "test")
    ]
    found = conversations([*range(9), 0, 1, 1], [0] * 9 + [1] * 2 + [2], [1] * 12)
    assert [len(chosen(found, datasets).of_split(name)) for name in SPLITS] == [7, 1, 1]
    found = conversations([0, 1, 0, 1, 2], [0] * 2 + [1] * 2 + [2], [1] * 5)
    with pytest.raises(
        NemotronError, match="train would be empty: valid or test has all its 2"
    ) as caught:
        chosen(found, datasets)
    assert (caught.value.code, caught.value.where) == ("empty_split", "train")


def test_lists_per_split_give_each_its_own_and_held_out_data_is_not_trained_on() -> None:
    uids = [*range(10), *range(8, 14), *range(12, 16)]
    datasets = [
        source("a").model_copy(update={"into": "train"}),
        source("b").model_copy(update={"into": "valid"}),
        source("c").model_copy(update={"into": "test"}),
    ]
    selection = chosen(conversations(uids, [0] * 10 + [1] * 6 + [2] * 4, [1] * 20), datasets)
    held = {
        name: [uids[i] for i in selection.of_split(name)] for name in ("train", "valid", "test")
    }
    assert held == {
        "train": list(range(8)),
        "valid": [8, 9, 10, 11],
        "test": [12, 13, 14, 15],
    }
    assert [dict(counts) for counts in selection.dropped] == [
        {"in_other_split": 2},
        {"in_other_split": 2},
        {},
    ]


def test_more_max_rows_are_a_superset_of_fewer() -> None:
    uids = np.random.default_rng(0).integers(0, 2**63, 50).tolist()
    found = conversations(uids, [0] * 50, [1] * 50)
    few, many = (
        set(np.flatnonzero(chosen(found, [source("a", max_rows=count)]).copies).tolist())
        for count in (20, 30)
    )
    assert (len(few), len(many)) == (20, 30)
    assert few < many
