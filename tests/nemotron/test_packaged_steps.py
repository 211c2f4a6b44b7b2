"""The steps that ship: manifests, configs and schemas agree, and the documented commands plan."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from nemotron.catalog import Step, config_names, find_steps, producers_of
from nemotron.cli.app import main
from nemotron.plan import build
from nemotron.validation import schema_keys

STEPS = find_steps()
REPOSITORY = Path(__file__).parents[2]
VARIABLES = (
    "SFT_OUTPUT_DIR",
    "SFT_PACKED_DIR",
    "MEGATRON_PRETRAIN_PATH",
    "PEFT_OUTPUT_DIR",
    "CONVERT_OUTPUT_DIR",
    "NEMOTRON_WORKSPACE",
)
every_step = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.id)


@pytest.fixture
def empty(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory, none of our variables set, the templates at hand."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(REPOSITORY / "profiles", here / "profiles")
    return here


def test_the_steps_are_there() -> None:
    assert [step.id for step in STEPS] == [
        "convert/hf_to_megatron",
        "convert/megatron_to_hf",
        "convert/merge_lora",
        "data_prep/sft_packing",
        "peft/megatron_bridge",
    ]


@every_step
def test_every_key_that_a_manifest_names_is_one_of_the_schema(step: Step) -> None:
    manifest = step.manifest
    named = {parameter.name for parameter in manifest.parameters}
    for artifact in (*manifest.consumes, *manifest.produces):
        named |= set(artifact.keys)
    assert named <= set(schema_keys(step.load_schema().Config))


@every_step
def test_an_output_without_a_name_is_refused(
    step: Step, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = step.manifest.produces[0].keys[0]
    assert main(["steps", "run", step.id, "-d", f"{key}="]) in (2, 3)
    said = capsys.readouterr().err
    assert f"{key} is null; wanted a path" in said or "at least one output" in said


@every_step
def test_every_default_and_choice_of_a_manifest_is_accepted(step: Step, empty: Path) -> None:
    for parameter in step.manifest.parameters:
        for value in (
            *parameter.choices,
            *([] if parameter.default is None else [parameter.default]),
        ):
            build(step, overrides=[f"{parameter.name}={json.dumps(value)}"])


@every_step
@pytest.mark.parametrize("name", ["default", "tiny"])
def test_every_config_plans_without_any_variable(
    step: Step, name: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in config_names(step)
    assert main(["steps", "run", step.id, "-c", name, "--dry-run"]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in empty.iterdir()) == ["profiles", "pyproject.toml"]


@every_step
def test_the_tiny_config_names_who_makes_what_is_missing(step: Step, empty: Path) -> None:
    plan = build(step, config="tiny")
    for item in plan.inputs:
        if item.path is not None and not Path(item.path).exists():
            assert item.producer is not None, item.key
            assert item.producer.step in producers_of(item.type, STEPS)


# The command examples of the step's reference page, as they stand there.
EXAMPLES = r"""
nemotron steps run peft/megatron_bridge -c tiny
nemotron steps run peft/megatron_bridge -c default --dry-run
nemotron steps run peft/megatron_bridge -c default -r lepton_peft_megatron_bridge \
    peft.dim=16 \
    recipe.seq_length=8192 \
    train.train_iters=2000
nemotron steps run peft/megatron_bridge -c default -b slurm_peft_megatron_bridge \
    peft.dim=32 \
    recipe.tensor_model_parallel_size=8 \
    train.global_batch_size=64
"""
PARAMETERS = [
    "peft.type=lora",
    "peft.dim=16",
    "recipe.seq_length=8192",
    "recipe.tensor_model_parallel_size=8",
    "train.train_iters=2000",
    "train.global_batch_size=32",
    "dataset.nano3_packed_sft_dir=/lustre/packed/super3-sft",
]


@pytest.mark.parametrize(
    "command", EXAMPLES.replace("\\\n", " ").strip().splitlines(), ids=lambda text: text[16:70]
)
def test_the_command_examples_plan_verbatim(
    command: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*shlex.split(command)[1:], "--dry-run", "--json"]
    assert main(argv) == 0, capsys.readouterr()
    plan = json.loads(capsys.readouterr().out)
    overrides = dict(word.split("=") for word in argv if "=" in word)
    for key, text in overrides.items():
        section, name = key.split(".")
        assert plan["config"][section][name] == int(text)
        assert plan["origins"][key] == f"argument {key}={text}"


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_documented_override_of_peft_is_accepted(parameter: str, empty: Path) -> None:
    (step,) = [step for step in STEPS if step.id == "peft/megatron_bridge"]
    key, _, text = parameter.partition("=")
    section, name = key.split(".")
    plan = build(step, overrides=[parameter])
    assert str(plan.values[section][name]) == text


def test_eight_way_tensor_parallelism_starts_eight_ranks_on_one_node(empty: Path) -> None:
    (step,) = [step for step in STEPS if step.id == "peft/megatron_bridge"]
    plan = build(step, overrides=["recipe.tensor_model_parallel_size=8"])
    assert plan.num_ranks == 8


def test_a_reserved_word_is_no_profile(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "run", "merge_lora", "-r", "wandb", "-d"]) == 2
    assert "reserved" in capsys.readouterr().err


def test_tiny_trains_where_there_are_fewer_gpus_than_ranks() -> None:
    step = next(step for step in STEPS if step.id == "peft/megatron_bridge")
    plan = build(step, config="tiny")
    assert plan.num_ranks == 2
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "-1"
    on_gpus = build(step, config="tiny", overrides=["run.env.env_vars.CUDA_VISIBLE_DEVICES=null"])
    assert "CUDA_VISIBLE_DEVICES" not in on_gpus.environment
