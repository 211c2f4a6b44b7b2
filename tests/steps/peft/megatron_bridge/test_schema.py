"""What the schema derives and refuses on its own, without any file."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron.steps.peft.megatron_bridge.schema import Config


def config(**scheduler: Any) -> Config:
    return Config.model_validate({"train": {"train_iters": 20}, "scheduler": scheduler})


@pytest.mark.parametrize(
    ("scheduler", "warmup_iters"),
    [
        ({"lr_warmup_iters": 5}, 5),
        ({"lr_warmup_iters": 50}, 19),  # cut short, as Megatron does
        ({"lr_warmup_fraction": 0.12}, 2.4),
        ({"lr_warmup_fraction": 0.5, "lr_decay_iters": 10}, 5),
        ({"lr_warmup_fraction": 1.0}, 19),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 0}, 2),
    ],
)
def test_the_warm_up_is_stated_in_iterations_or_as_a_fraction(
    scheduler: dict[str, Any], warmup_iters: float
) -> None:
    assert config(**scheduler).lr_warmup_iters == pytest.approx(warmup_iters)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}, "both state the warm-up"),
        ({"lr_warmup_init": 1.0}, r"lr_warmup_init=1.0 is more than optimizer.lr=0.0001"),
        ({"lr_decay_style": "WSD"}, "needs scheduler.lr_wsd_decay_iters.*it is None"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 21}, "in 1 to 20; it is 21"),
        (
            {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 0},
            "needs a warm-up of 1 iteration or more",
        ),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(
    scheduler: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**scheduler)


def test_a_floor_above_the_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer.min_lr=0.1 is more than optimizer.lr=0.01"):
        Config.model_validate({"optimizer": {"lr": 0.01, "min_lr": 0.1}})
