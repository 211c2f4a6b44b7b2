"""The learning rate against Megatron's rules."""

from __future__ import annotations

import pytest

from nemotron.steps._training.schedule import Schedule


def test_warm_up_starts_at_zero_and_reaches_lr_after_its_iterations() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_iters=4, decay_iters=12, style="linear")
    assert [schedule.at(i) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("style", "halfway"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)]
)
def test_decay_is_half_done_halfway(style: str, halfway: float) -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_iters=2, decay_iters=12, style=style)  # pyright: ignore[reportArgumentType]
    assert schedule.at(7) == pytest.approx(halfway)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_decay_ends_at_min_lr_and_stays_there(style: str) -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_iters=0, decay_iters=10, style=style)  # pyright: ignore[reportArgumentType]
    assert schedule.at(0) == 1.0
    assert schedule.at(10) == pytest.approx(0.1)
    assert schedule.at(99) == 0.1


def test_cosine_equals_megatron_cores_values() -> None:
    # What megatron-core 0.16.1 used at lr 1e-2, min 1e-3, warm-up 2 of 6 iterations.
    schedule = Schedule(lr=1e-2, min_lr=1e-3, warmup_iters=2, decay_iters=6, style="cosine")
    wanted = [0.0, 0.005, 0.01, 0.008681980515339464, 0.0055, 0.0023180194846605367]
    assert [schedule.at(i) for i in range(6)] == pytest.approx(wanted, rel=1e-12)
