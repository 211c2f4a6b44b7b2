"""The learning rate against Megatron's rules."""

from __future__ import annotations

import pytest

from nemotron.steps._training.schedule import Schedule

# What megatron-core 0.16.1 used at lr 1e-2, min 1e-3, warm-up 2 of 8 iterations from 1e-4, and
# 4 iterations of decay for WSD, in iterations 2 to 9.
MEGATRON = {
    ("inverse-square-root", "linear"): [
        *(0.01, 0.008164965809277261, 0.007071067811865476, 0.00632455532033676),
        *(0.005773502691896259, 0.005345224838248488, 0.005, 0.001),
    ],
    ("WSD", "exponential"): [
        *(0.01, 0.010000000000000002, 0.010000000000000002, 0.0071361354745668616),
        *(0.004727922061357857, 0.0027028640350244895, 0.001, 0.001),
    ],
    ("WSD", "linear"): [
        *(0.01, 0.010000000000000002, 0.010000000000000002, 0.007750000000000001),
        *(0.0055000000000000005, 0.0032500000000000003, 0.001, 0.001),
    ],
    ("WSD", "cosine"): [
        *(0.01, 0.010000000000000002, 0.010000000000000002, 0.008681980515339464),
        *(0.0055000000000000005, 0.0023180194846605367, 0.001, 0.001),
    ],
    ("WSD", "minus_sqrt"): [
        *(0.01, 0.010000000000000002, 0.010000000000000002, 0.0055000000000000005),
        *(0.003636038969321072, 0.002205771365940053, 0.001, 0.001),
    ],
}


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


@pytest.mark.parametrize(("style", "wsd_style"), MEGATRON)
def test_other_styles_equal_megatron_cores_values(style: str, wsd_style: str) -> None:
    schedule = Schedule(
        lr=1e-2,
        min_lr=1e-3,
        warmup_iters=2,
        decay_iters=8,
        style=style,  # pyright: ignore[reportArgumentType]
        warmup_init=1e-4,
        wsd_decay_iters=4,
        wsd_style=wsd_style,  # pyright: ignore[reportArgumentType]
    )
    assert [schedule.at(i) for i in range(2)] == pytest.approx([1e-4, 5.05e-3], rel=1e-12)
    wanted = MEGATRON[style, wsd_style]
    assert [schedule.at(i) for i in range(2, 10)] == pytest.approx(wanted, rel=1e-12)


def test_a_warm_up_may_end_between_two_iterations() -> None:
    schedule = Schedule(lr=1.0, min_lr=0.0, warmup_iters=2.5, decay_iters=12, style="constant")
    assert [schedule.at(i) for i in range(4)] == pytest.approx([0.0, 0.4, 0.8, 1.0])


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_decay_shorter_than_an_iteration_ends_at_min_lr(style: str) -> None:
    schedule = Schedule(lr=1.0, min_lr=0.1, warmup_iters=2.5, decay_iters=3, style=style)  # pyright: ignore[reportArgumentType]
    assert schedule.at(3) == pytest.approx(0.1)
