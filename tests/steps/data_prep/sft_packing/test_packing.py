"""Packing: every document once, no row over capacity, and the algorithms mean what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps.data_prep.sft_packing.packing import Rows, pack
from nemotron.steps.data_prep.sft_packing.schema import Algorithm

ALGORITHMS = get_args(Algorithm)
CAPACITY = 50
lengths_of = st.lists(st.integers(1, CAPACITY), max_size=80)


def row_lists(rows: Rows) -> list[list[int]]:
    bounds = pairwise(rows.starts.tolist())
    return [rows.documents[start:end].tolist() for start, end in bounds]


def scan_first_fit(lengths: list[int]) -> list[list[int]]:
    """First fit as the textbook says it: look at every row from the first."""
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= CAPACITY:
                row.append(index)
                break
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(lengths=lengths_of, seed=st.integers(0, 3))
def test_pack_places_every_document_once_and_fills_no_row_over_capacity(
    algorithm: str, lengths: list[int], seed: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = row_lists(pack(array, capacity=CAPACITY, algorithm=algorithm, seed=seed))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[index] for index in row) <= CAPACITY for row in rows)


@given(lengths=lengths_of)
def test_first_fit_decreasing_makes_the_rows_of_a_plain_scan(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = pack(array, capacity=CAPACITY, algorithm="first_fit_decreasing", seed=1)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    scanned = scan_first_fit([lengths[index] for index in order])
    assert sorted(row_lists(rows)) == sorted([order[i] for i in row] for row in scanned)


@given(lengths=lengths_of)
def test_concatenative_keeps_the_order_and_opens_a_row_only_when_the_last_is_full(
    lengths: list[int],
) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = row_lists(pack(array, capacity=CAPACITY, algorithm="concatenative", seed=0))
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    for row, following in pairwise(rows):
        assert sum(lengths[index] for index in row) + lengths[following[0]] > CAPACITY


@given(lengths=lengths_of)
def test_best_fit_decreasing_makes_rows_of_the_sizes_of_a_plain_scan(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    rows = pack(array, capacity=CAPACITY, algorithm="best_fit_decreasing", seed=1)
    scanned: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in scanned if sum(row) + length <= CAPACITY]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            scanned.append([length])
    found = [sorted(lengths[index] for index in row) for row in row_lists(rows)]
    assert len(found) == len(scanned)
    assert sorted(map(sum, found)) == sorted(map(sum, scanned))


def test_shuffle_fill_needs_no_more_rows_than_best_fit_but_mixes_short_documents() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(400), 1.1, 5000).astype(int), 1, 4096)
    ours, best, fit = (
        pack(lengths, capacity=4096, algorithm=name, seed=0)
        for name in ("shuffle_fill", "best_fit_decreasing", "first_fit_shuffle")
    )
    assert ours.num_rows <= best.num_rows <= fit.num_rows
    most = [np.percentile(np.diff(rows.starts), 99) for rows in (ours, best, fit)]
    assert most[0] <= 2 * most[2] < most[1]


def test_shuffle_fill_gives_way_where_best_fit_saves_rows() -> None:
    lengths = np.array([10, 10, 10, 10, 25, 25, 40, 40, 40, 40] * 50)
    ours, best = (
        pack(lengths, capacity=CAPACITY, algorithm=name, seed=0)
        for name in ("shuffle_fill", "best_fit_decreasing")
    )
    assert ours.num_rows == best.num_rows == 250


@pytest.mark.parametrize("algorithm", ALGORITHMS[:4])
def test_pack_depends_on_the_seed_alone(algorithm: str) -> None:
    lengths = np.arange(1, 51)
    one, same, other = (
        row_lists(pack(lengths, capacity=CAPACITY, algorithm=algorithm, seed=seed))
        for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other


def test_pack_refuses_a_document_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match=r"lengths are 3\.\.51; wanted 1\.\.50"):
        pack(np.array([3, 51]), capacity=CAPACITY, algorithm="concatenative", seed=0)


def test_pack_refuses_an_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="no packing algorithm 'best'"):
        pack(np.array([3]), capacity=CAPACITY, algorithm="best", seed=0)
