"""nemotron.steps._training.flat_adapter: how the ranks' copies of an adapter stay equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.steps._training.replicas_worker import NUM_RANKS

WORKER = Path(__file__).with_name("replicas_worker.py")


@pytest.fixture(scope="module")
def found(run_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_ranks(WORKER, NUM_RANKS)


def test_copies_that_are_equal_have_no_difference(found: dict[str, Any]) -> None:
    assert found["equal"] == found["no factors"] == [0.0] * NUM_RANKS


def test_every_rank_is_told_the_largest_difference_of_any(found: dict[str, Any]) -> None:
    # A rank that was not told would go on, and wait for those that stop.
    assert found["one rank differs"] == [0.5] * NUM_RANKS


@pytest.mark.parametrize("where", ["the first rank", "another rank"])
def test_a_copy_that_is_not_a_number_is_a_difference_wherever_it_is(
    found: dict[str, Any], where: str
) -> None:
    assert all(math.isnan(each) for each in found[f"{where} is not a number"])


def test_a_rank_holds_one_part_of_one_other_copy_at_a_time(found: dict[str, Any]) -> None:
    assert found["elements received at once"] == 2


def test_copies_of_a_gradient_are_the_same_bits_where_groups_add_in_other_orders(
    found: dict[str, Any],
) -> None:
    assert len(set(found["sums that round"])) == 1, found["sums that round"]


def test_copies_of_a_gradient_count_once_for_each_replica(found: dict[str, Any]) -> None:
    assert found["sums"] == [6.0] * NUM_RANKS
