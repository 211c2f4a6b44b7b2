"""What holds for all weights, whatever they lie in."""

from __future__ import annotations

import math

import pytest
import torch

from nemotron.steps._formats.weights import DTYPES, all_finite


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_one_value_that_is_not_finite_is_found_and_a_sum_that_overflows_is_none(
    dtype: torch.dtype,
) -> None:
    weight = torch.full((9, 500), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(weight)
    assert all_finite(torch.empty(0, 5, dtype=dtype))
    for values in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]):
        for rest in (weight, -weight, torch.zeros_like(weight)):
            harmed = rest.clone()
            harmed[4, 7 : 7 + len(values)] = torch.tensor(values, dtype=dtype)
            assert not all_finite(harmed)
