"""nemotron.steps._training.flat_adapter: how the ranks' copies of an adapter are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("replicas_worker.py")


@pytest.fixture(scope="module")
def found(run_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_ranks(WORKER, 4)


def test_copies_that_are_equal_have_no_difference(found: dict[str, Any]) -> None:
    assert found["equal"] == found["no factors"] == [0.0] * 4


def test_every_rank_is_told_the_largest_difference_of_any(found: dict[str, Any]) -> None:
    # A rank that was not told would go on, and wait for those that stop.
    assert found["one rank differs"] == [0.5] * 4


@pytest.mark.parametrize("where", ["the first rank", "another rank"])
def test_a_copy_that_is_not_a_number_is_a_difference_wherever_it_is(
    found: dict[str, Any], where: str
) -> None:
    assert all(math.isnan(each) for each in found[f"{where} is not a number"])


def test_a_rank_holds_one_part_of_one_other_copy_at_a_time(found: dict[str, Any]) -> None:
    assert found["elements received at once"] == 2
