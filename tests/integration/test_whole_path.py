"""The four tiny steps through the command line, as a user runs them in an empty directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.megatron import open_megatron
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model

BASE = Path(__file__).parents[2] / "steps" / "_tiny" / "model"


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


def nemotron(directory: Path, *arguments: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "nemotron", *arguments],
        cwd=directory,
        env={key: value for key, value in os.environ.items() if not key.startswith("NEMOTRON")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class World:
    """A directory in which all four steps have run."""

    directory: Path

    @property
    def training(self) -> Path:
        return self.directory / "output" / "peft" / "megatron_bridge" / "tiny"

    @property
    def adapter(self) -> Path:
        return sorted(self.training.glob("iter_*"))[-1]

    @property
    def base(self) -> Path:
        return self.directory / "output" / "convert" / "hf_to_megatron" / "tiny"

    @property
    def merged(self) -> Path:
        return self.directory / "output" / "convert" / "merge_lora" / "tiny" / "hf"

    @property
    def packs(self) -> Path:
        return self.directory / "output" / "data_prep" / "sft_packing" / "tiny"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The last step alone: it makes whatever is missing first."""
    directory = tmp_path_factory.mktemp("whole path")
    done = nemotron(directory, "steps", "run", "convert/merge_lora", "-c", "tiny")
    assert done.code == 0, done.out + done.err
    return World(directory)


def test_held_out_loss_falls_by_at_least_20_percent(world: World) -> None:
    properties = json.loads((world.adapter / "artifact.json").read_text())["properties"]
    assert properties["valid_loss"] <= 0.8 * properties["valid_loss_before"]


def test_peft_the_trainer_and_the_merged_checkpoint_give_the_same_logits(world: World) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(world.merged, dtype=torch.float32)
    trainer = trainers_model(world)
    peft = PeftModel.from_pretrained(base, world.adapter)
    prompts = torch.randint(0, 1024, (64, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = peft(prompts).logits
        got = merged(prompts).logits
        flat = trainer(prompts.flatten(), range(0, prompts.numel() + 1, prompts.shape[1]))
        ours = trainer.logits(flat).view_as(wanted)
    # fp32 logits of size about 10, summed in another order once the adapter is in the weight.
    assert (got - wanted).abs().max() < 1e-4
    assert (ours - wanted).abs().max() < 1e-4


def trainers_model(world: World):
    checkpoint = open_megatron(world.base)
    adapter = open_adapter(world.adapter, config=checkpoint.config)
    spec = LoraSpec(adapter.dim, adapter.alpha)
    model = load_base_model(
        checkpoint,
        lora=LoraTargets(("linear_qkv", "linear_proj"), spec),
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    factors = adapter.factors()
    for linear in model.adapted_linears():
        linear.load_lora(*factors[linear.name])
    return model


def test_peft_finds_no_missing_and_no_unexpected_adapter_key(world: World) -> None:
    from safetensors.torch import load_file

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, world.adapter)
    wanted = {name.replace(".default.", ".") for name in peft.state_dict() if ".lora_" in name}
    assert set(load_file(world.adapter / "adapter_model.safetensors")) == wanted


def test_the_merged_checkpoint_answers_in_the_chats_own_form(world: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.merged)
    model = AutoModelForCausalLM.from_pretrained(world.merged)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Norway?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith("The capital of")
    assert answer.endswith("<|im_end|>")


def test_a_rerun_of_a_finished_step_needs_no_producer(world: World) -> None:
    done = nemotron(world.directory, "steps", "run", "convert/merge_lora", "-c", "tiny")
    assert done.code == 0
    assert "sft_packing" not in done.err


def copy_of(world: World, directory: Path) -> World:
    shutil.copytree(world.directory / "output", directory / "output")
    return World(directory)


def one_error(done: Done, code: str, exit_code: int) -> None:
    """Check that a command failed with one error, a fix, its exit code and no traceback."""
    assert done.code == exit_code, done.err
    assert done.err.count("error[") == 1, done.err
    assert f"error[{code}]" in done.err
    assert "fix: " in done.err
    assert "Traceback" not in done.err


def test_a_truncated_shard_is_one_error_with_exit_code_4(world: World, tmp_path: Path) -> None:
    copy = copy_of(world, tmp_path)
    shard = next((copy.packs / "splits" / "train").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    done = nemotron(tmp_path, "steps", "run", "peft/megatron_bridge", "-c", "tiny")
    one_error(done, "artifact_damaged", 4)
    assert shard.name in done.err


def test_a_misspelt_key_is_one_error_with_the_closest_key_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["steps", "run", "peft/megatron_bridge", "-c", "tiny", "train.train_itres=5"]
    done = nemotron(tmp_path, *arguments)
    one_error(done, "unknown_key", 2)
    assert "train.train_iters" in done.err
    assert not list(tmp_path.iterdir())


def test_another_base_at_the_merge_is_one_error_with_exit_code_4(
    world: World, tmp_path: Path
) -> None:
    copy = copy_of(world, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(1.5)
    model.save_pretrained(other)
    arguments = ["steps", "run", "convert/merge_lora", "-c", "tiny", "backend=hf_peft"]
    arguments += ["base_megatron_path=null", f"base_hf_path={other}", "output_hf_path=out"]
    done = nemotron(copy.directory, *arguments)
    one_error(done, "base_model_mismatch", 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-r", "local", "-b", "local"], "options_exclude"),
        (["-r", "nowhere"], "profile_unknown"),
    ],
)
def test_a_wrong_profile_option_is_one_error_with_exit_code_2(
    tmp_path: Path, arguments: list[str], code: str
) -> None:
    done = nemotron(tmp_path, "steps", "run", "peft/megatron_bridge", "-c", "tiny", *arguments)
    one_error(done, code, 2)


def test_every_job_left_a_record_with_command_versions_and_exit_code(world: World) -> None:
    records: list[dict[str, Any]] = [
        json.loads(path.read_text())
        for path in (world.directory / ".nemotron" / "jobs").glob("*/job.json")
    ]
    assert {record["step"] for record in records} == {
        "data_prep/sft_packing",
        "convert/hf_to_megatron",
        "peft/megatron_bridge",
        "convert/merge_lora",
    }
    for record in records:
        assert record["exit_code"] == 0
        assert record["command"][0].endswith(("python", "python3", "python3.11"))
        assert {"python", "nemotron", "torch"} <= set(record["versions"])
