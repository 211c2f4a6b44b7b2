"""nemotron.steps._training.flat_adapter: how the ranks' copies of an adapter are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraParameter
from nemotron.steps._training import flat_adapter
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.flat_adapter import FlatAdapter

ALONE, PAIR = ProcessGroup(), ProcessGroup(size=2)
LAYOUT = Layout(ALONE, PAIR, PAIR, ALONE, PAIR, torch.device("cpu"))


def compared(
    monkeypatch: pytest.MonkeyPatch, own: Sequence[float], other: Sequence[float]
) -> float:
    """Return what an adapter finds whose other replica, compared two at a time, has ``other``."""
    parts = iter(torch.tensor(other).split(2))

    def gather(part: Tensor, group: ProcessGroup) -> Tensor:
        return torch.stack([part, next(parts)])

    monkeypatch.setattr(flat_adapter, "_COMPARED_AT_ONCE", 2)
    monkeypatch.setattr(flat_adapter, "all_gather", gather)
    factor = nn.Parameter(torch.tensor(own))
    factors = [LoraParameter("x.lora_a", factor, "replicated")] if own else []
    return FlatAdapter(factors, LAYOUT).replica_difference()


def test_the_largest_difference_of_any_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, [1.0, 2.0, 3.0], [1.0, 2.5, 3.25]) == 0.5


def test_a_copy_that_is_not_a_number_is_a_difference_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert math.isnan(compared(monkeypatch, [1.0, 2.0, 3.0], [math.nan, 2.0, 3.0]))


def test_a_stage_without_factors_has_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, [], []) == 0.0
