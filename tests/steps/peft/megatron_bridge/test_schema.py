"""What the schema derives and refuses on its own, without any file."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron.steps._training.loop import AdamSettings, BatchSettings, Intervals
from nemotron.steps._training.schedule import Schedule
from nemotron.steps.peft.megatron_bridge import settings
from nemotron.steps.peft.megatron_bridge.schema import Config


def config(**scheduler: Any) -> Config:
    return Config.model_validate({"train": {"train_iters": 20}, "scheduler": scheduler})


@pytest.mark.parametrize(
    ("scheduler", "warmup_iters"),
    [
        ({"lr_warmup_iters": 5}, 5),
        ({"lr_warmup_iters": 50}, 19.75),  # cut short by a row of 4, as Megatron does
        ({"lr_warmup_fraction": 0.12}, 2.4),
        ({"lr_warmup_fraction": 0.5, "lr_decay_iters": 10}, 5),
        ({"lr_warmup_fraction": 1.0}, 19.75),
        ({"lr_warmup_fraction": 0.99}, 19.8),
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
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 21}, "between 1 and 20; it is 21"),
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


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "key",
    [
        *(f"optimizer.{name}" for name in ("lr", "adam_eps", "weight_decay", "clip_grad")),
        *("peft.alpha", "peft.lora_plus_lr_ratio", "scheduler.lr_warmup_init"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(key: str, number: float) -> None:
    section, name = key.split(".")
    with pytest.raises(ValueError, match=name):
        Config.model_validate({section: {name: number}})
    with pytest.raises(ValueError, match="alpha_pattern"):
        Config.model_validate({"peft": {"alpha_pattern": {"linear_qkv": number}}})


@pytest.mark.parametrize("seed", [-1, 2**63, 2**200])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        Config.model_validate({"rng": {"seed": seed}})


@pytest.mark.parametrize(
    ("sections", "is_split"),
    [
        ({}, True),
        ({"recipe": {"sequence_parallel": False}}, False),
        ({"model": {"sequence_parallel": False}}, False),
        ({"model": {"sequence_parallel": True}}, True),
    ],
)
def test_the_sequence_is_split_unless_the_config_says_otherwise(
    sections: dict[str, Any], is_split: bool
) -> None:
    recipe = {"tensor_model_parallel_size": 2} | sections.get("recipe", {})
    stated = Config.model_validate(sections | {"recipe": recipe})
    assert settings.model(stated).sequence_parallel == is_split


@pytest.mark.parametrize("section", ["recipe", "model"])
def test_recomputation_is_asked_for_in_either_section(section: str) -> None:
    asked = Config.model_validate({section: {"recompute_granularity": "full"}})
    assert settings.model(asked).recompute
    assert not settings.model(Config()).recompute


def test_what_the_config_says_reaches_the_trainer() -> None:
    optimizer = {"lr": 0.5, "min_lr": 0.25, "clip_grad": 3.0, "weight_decay": 0.75}
    optimizer |= {"adam_beta1": 0.125, "adam_beta2": 0.375, "adam_eps": 0.0625}
    scheduler = {"lr_decay_style": "WSD", "lr_warmup_iters": 2, "lr_decay_iters": 9}
    scheduler |= {"lr_warmup_init": 0.1, "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "linear"}
    config = Config.model_validate(
        {
            "optimizer": optimizer,
            "scheduler": scheduler,
            "peft": {"lora_plus_lr_ratio": 8.0},
            "model": {"calculate_per_token_loss": False},
            "train": {
                "train_iters": 20,
                "eval_interval": 5,
                "eval_iters": 3,
                "global_batch_size": 6,
                "micro_batch_size": 2,
            },
            "checkpoint": {"save_interval": 7},
        }
    )
    assert settings.schedule(config) == Schedule(0.5, 0.25, 2, 9, "WSD", 0.1, 4, "linear")
    assert settings.adam(config) == AdamSettings(0.125, 0.375, 0.0625, 0.75, 3.0, 8.0)
    assert settings.batch(config) == BatchSettings(6, 2, calculate_per_token_loss=False)
    assert settings.intervals(config) == Intervals(20, 5, 3, 7)
