"""A run with patterns, rsLoRA and LoRA+ at two layouts, and what PEFT makes of its adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nemotron.artifacts import read_artifact
from nemotron.errors import ExitCode

Train = Callable[..., Any]
LAST = "base_model.model.model.layers.1.mlp"
# As in test_layouts.py, times the ratio of LoRA+ for a step of lora_b.
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 5e-6, 4e-4
VARIANT = {
    "peft.target_modules": ["*.layers.0.self_attention.*", "decoder.layers.1.mlp.linear_fc?"],
    "peft.use_rslora": True,
    "peft.alpha": 3.0,
    "peft.rank_pattern": {"linear_fc1": 2},
    "peft.alpha_pattern": {"*.layers.1.*": 1.5},
    "peft.lora_plus_lr_ratio": 4.0,
    "optimizer.lr": 0.01,
    "scheduler.lr_decay_style": "WSD",
    "scheduler.lr_wsd_decay_iters": 4,
}


@pytest.fixture(scope="module")
def run(train: Train) -> Any:
    done = train(**VARIANT)
    assert done.exit_code == 0, done.stderr
    return done


def test_a_variant_does_not_depend_on_the_layout(train: Train, run: Any) -> None:
    layout = {"recipe.tensor_model_parallel_size": 2}
    other = train(**VARIANT, **layout)
    assert other.exit_code == 0, other.stderr
    assert other.losses == pytest.approx(run.losses, rel=LOSS_TOLERANCE)
    name = "adapter_model.safetensors"
    got, wanted = load_file(other.adapter / name), load_file(run.adapter / name)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert float((got[key] - wanted[key]).abs().max()) <= ADAPTER_TOLERANCE, key


def test_peft_finds_every_module_of_a_variant_with_its_scale(world: Any, run: Any) -> None:
    base = LlamaForCausalLM.from_pretrained(world.hf)
    model = PeftModel.from_pretrained(base, run.adapter)
    adapted = {
        name: module.scaling["default"]  # type: ignore[index]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(adapted) == 4 + 3
    scales = {
        f"{LAST}.{name}_proj": scale
        for name, scale in (("gate", 1.5 / 2**0.5), ("up", 1.5 / 2**0.5), ("down", 1.5 / 4**0.5))
    }
    first = {name: 3.0 / 4**0.5 for name in adapted if ".layers.0.self_attn." in name}
    assert adapted == pytest.approx(scales | first, rel=1e-15)


def test_the_artifact_and_the_config_of_the_adapter_say_what_it_is(run: Any) -> None:
    lora = read_artifact(run.adapter, "checkpoint_lora").properties["lora"]
    assert lora["use_rslora"] is True
    assert lora["rank_pattern"] == {"linear_fc1": 2}
    assert lora["alpha_pattern"] == {"*.layers.1.*": 1.5}
    config = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["use_rslora"] is True
    assert "model.layers.1.mlp.down_proj" in config["target_modules"]


def test_a_pattern_that_names_nothing_is_refused_by_the_step_where_no_check_knew_the_base(
    world: Any, train: Train, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    (base / "artifact.json").unlink()
    changes = {"peft.target_modules": ["*.layers.7.*"]}
    done = train(**changes, **{"checkpoint.pretrained_checkpoint": str(base)})
    assert (done.error["code"], done.error["exit_code"]) == ("no_such_module", ExitCode.PREFLIGHT)
    assert (
        "'*.layers.7.*', which matches none of the 16 linears of 4 layers" in done.error["problem"]
    )


def test_the_best_evaluation_is_recorded(run: Any) -> None:
    evaluations = [event for event in run.events if event["event"] == "validation"]
    losses = [event["lm_loss"] for event in evaluations]
    assert [event["is_best"] for event in evaluations] == [
        loss == min(losses[: index + 1]) for index, loss in enumerate(losses)
    ]
    properties = read_artifact(run.adapter, "checkpoint_lora").properties
    assert properties["best_valid_loss"] == min(losses)
    best = next(event for event in evaluations if event["lm_loss"] == min(losses))
    assert properties["best_iteration"] == best["iteration"]
