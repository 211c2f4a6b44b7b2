"""LoRA+ on the flat adapter against torch's AdamW with two parameter groups, in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("adamw_worker.py")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_lora_b_learns_at_its_own_rate_as_in_a_group_of_its_own(
    run_ranks: Callable[..., Any], num_ranks: int
) -> None:
    report = run_ranks(WORKER, num_ranks)
    # Sums of float64 products in another order; five steps of at most 0.16 leave them rounding.
    assert max(report.values()) < 1e-13, report
