"""What the step refuses: each by the name, the cause and the fix of its manifest's entry."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemotron.artifacts import read_artifact, write_artifact
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps.peft.megatron_bridge.checks import check, check_config, existing_inputs
from nemotron.steps.peft.megatron_bridge.schema import Config

Train = Callable[..., Any]


def config(world: Any, **sections: Any) -> Config:
    values = {
        "recipe": {"seq_length": 64},
        "dataset": {"nano3_packed_sft_dir": str(world.packs)},
        "checkpoint": {"pretrained_checkpoint": str(world.base)},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config.model_validate(values)


def codes(errors: list[NemotronError]) -> list[str]:
    return [error.code for error in errors]


def test_a_config_that_fits_has_no_errors(world: Any) -> None:
    assert check(config(world)) == []


def test_another_sequence_length_than_the_packs_is_refused(world: Any) -> None:
    (error,) = check(config(world, recipe={"seq_length": 128}))
    assert error.code == "seq_length_mismatch"
    assert "128" in error.problem
    assert "64" in error.problem
    assert "recipe.seq_length" in error.fix


def test_what_is_wrong_in_a_config_alone_is_found_without_its_files(world: Any) -> None:
    recipe = {"seq_length": 128, "context_parallel_size": 2}
    assert codes(check_config(config(world, recipe=recipe))) == ["layout_unsupported"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"pipeline_model_parallel_size": 5},  # the base has 4 layers
        {"context_parallel_size": 2},
        {"expert_model_parallel_size": 2},
        {"tensor_model_parallel_size": 8},  # the base has 4 query groups
        {"data_parallel_size": 3},  # of a global batch of 4 rows
    ],
)
def test_a_layout_that_cannot_run_is_refused_before_anything_starts(
    world: Any, recipe: Any
) -> None:
    (error,) = check(config(world, recipe={"seq_length": 64, **recipe}))
    assert error.code == "layout_unsupported"
    assert error.exit_code == ExitCode.PREFLIGHT


@pytest.mark.parametrize(
    ("stages", "model", "problem"),
    [
        (1, {"virtual_pipeline_model_parallel_size": 2}, "needs more than one pipeline stage"),
        (2, {"virtual_pipeline_model_parallel_size": 3}, "4 layers cannot be split over 6"),
        (2, {"num_layers_in_last_pipeline_stage": 4}, "4 layers cannot be split over 2"),
        (
            2,
            {"virtual_pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
            "parts must be of equal size",
        ),
    ],
)
def test_a_split_of_the_layers_that_cannot_be_is_refused(
    world: Any, stages: int, model: dict[str, int], problem: str
) -> None:
    recipe = {"pipeline_model_parallel_size": stages}
    (error,) = check(config(world, recipe=recipe, model=model))
    assert error.code == "layout_unsupported"
    assert problem in error.problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.num_layers_in_first_pipeline_stage": 3}, "4 layers cannot be split over 1"),
        ({"recipe.tensor_model_parallel_size": 3}, "num_query_groups 4 is not divisible by"),
    ],
)
def test_a_layout_is_refused_alike_for_a_base_without_a_hugging_face_config(
    world: Any, train: Train, tmp_path: Path, changes: dict[str, int], problem: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    shutil.rmtree(base / "hf")
    (base / "artifact.json").unlink()
    run = train(**{"checkpoint.pretrained_checkpoint": str(base)}, **changes)
    assert run.error["code"] == "layout_unsupported"
    assert run.error["exit_code"] == ExitCode.PREFLIGHT
    assert problem in run.error["problem"]


def test_less_rows_than_a_global_batch_are_refused(world: Any) -> None:
    assert codes(check(config(world, train={"global_batch_size": 16}))) == ["too_few_rows"]


@pytest.mark.parametrize(
    ("of_base", "has"), [('"def"', "has tokenizer def"), ("null", "has no tokenizer.json")]
)
def test_another_tokenizer_than_the_base_is_refused(
    world: Any, tmp_path: Path, of_base: str, has: str
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(world.packs, packs)
    manifest = packs / "artifact.json"
    text = manifest.read_text().replace('"tokenizer_blake3": null', '"tokenizer_blake3": "abc"')
    manifest.write_text(text)
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    manifest = base / "artifact.json"
    text = manifest.read_text().replace(
        '"tokenizer_blake3": null', f'"tokenizer_blake3": {of_base}'
    )
    manifest.write_text(text)
    sections = {
        "dataset": {"nano3_packed_sft_dir": str(packs)},
        "checkpoint": {"pretrained_checkpoint": str(base)},
    }
    (error,) = check(config(world, **sections))
    assert error.code == "tokenizer_mismatch"
    assert f"{packs} was made with tokenizer abc, {base} {has}" == error.problem


def test_a_shard_that_the_packs_do_not_list_is_refused(world: Any, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(world.packs, packs)
    stale = packs / "splits" / "train" / "shard-00000-of-00002.parquet"
    shutil.copy(packs / "splits" / "valid" / "shard-00000-of-00001.parquet", stale)
    (error,) = check(config(world, dataset={"nano3_packed_sft_dir": str(packs)}))
    assert (error.code, error.exit_code) == ("artifact_unlisted", ExitCode.DATA)
    assert str(stale) in error.problem


def test_an_adapter_as_base_is_refused(world: Any) -> None:
    mixed = config(world, checkpoint={"pretrained_checkpoint": str(world.packs)})
    assert "base_and_adapter_paths_mixed" in codes(check(mixed))


def test_packs_are_found_from_the_train_split_and_from_a_glob(world: Any) -> None:
    for path in (world.packs / "splits" / "train", world.packs / "splits" / "train" / "*.parquet"):
        specs = {"packed_sequence_specs": {"packed_train_data_path": str(path)}}
        found = config(world, dataset={"nano3_packed_sft_dir": None, **specs})
        assert existing_inputs(found)[0] == world.packs


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        ({"dataset": {"nano3_packed_sft_dir": "/nowhere"}}, "missing_packed_data"),
        ({"checkpoint": {"pretrained_checkpoint": "/nowhere"}}, "missing_base_checkpoint"),
        ({"checkpoint": {"pretrained_checkpoint": None}}, "missing_base_checkpoint"),
    ],
)
def test_a_missing_input_is_named(world: Any, sections: Any, code: str) -> None:
    with pytest.raises(NemotronError) as caught:
        existing_inputs(config(world, **sections))
    assert caught.value.code == code
    assert caught.value.fix.startswith("run ")


def test_one_fact_stated_twice_and_differently_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe\.seq_length=64, model\.seq_length=128"):
        Config.model_validate({"recipe": {"seq_length": 64}, "model": {"seq_length": 128}})


def test_a_target_that_does_not_exist_is_refused_with_those_that_do() -> None:
    for key, value in (("target_modules", ["linear_q"]), ("rank_pattern", {"linear_q": 4})):
        wrong = rf"peft\.{key}\s.*\['linear_q'\] must be some of \['linear_qkv'"
        with pytest.raises(ValueError, match=wrong):
            Config.model_validate({"peft": {key: value}})


@pytest.mark.parametrize(
    ("key", "value", "closest"),
    [
        ("target_modules", ["linear_qkv", "*.layers.4.mlp.linear_fc1"], ".mlp.linear_fc1"),
        ("rank_pattern", {"linear_fc1": 8}, ".self_attention.linear_qkv"),
        ("alpha_pattern", {"*.layers.4.*": 8.0}, ".self_attention.linear_"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_the_closest_names(
    world: Any, key: str, value: Any, closest: str
) -> None:
    (error,) = check(config(world, peft={key: value}))
    assert (error.code, error.exit_code) == ("no_such_module", ExitCode.PREFLIGHT)
    assert error.where == f"peft.{key}"
    assert closest in error.problem


def test_a_truncated_shard_stops_the_run_with_exit_code_4(
    world: Any, train: Train, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(world.packs, packs)
    shard = next((packs / "splits" / "train").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    run = train(**{"dataset.nano3_packed_sft_dir": str(packs), "recipe.data_parallel_size": 2})
    assert (run.error["code"], run.error["exit_code"]) == ("artifact_damaged", ExitCode.DATA)
    assert shard.name in run.error["problem"]
    # The second of three files: the ranks share them, and none waits for one that hashes all.
    # gloo of torch 2.10 writes which ranks are connected.
    said = [line for line in run.stderr.splitlines() if not line.startswith("[Gloo]")]
    assert said[0].startswith("[rank 1] error[artifact_damaged]")


def test_an_id_outside_of_the_vocabulary_is_a_bad_row(
    world: Any, train: Train, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(world.packs, packs)
    shard = next((packs / "splits" / "train").glob("*.parquet"))
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0]["input_ids"][0] = 97
    bad = table.from_pylist(rows, schema=table.schema)
    pq.write_table(bad, shard)
    rewrite_manifest(packs)
    run = train(**{"dataset.nano3_packed_sft_dir": str(packs), "recipe.data_parallel_size": 2})
    assert (run.error["code"], run.error["exit_code"]) == ("bad_packed_rows", ExitCode.DATA)
    assert "outside the vocabulary of 97" in run.error["problem"]
    assert run.stderr.count("error[") == 1


def test_a_valid_split_without_a_supervised_token_stops_before_the_first_step(
    world: Any, train_here: Train, tmp_path: Path
) -> None:
    packs = tmp_path / "packs"
    shutil.copytree(world.packs, packs)
    shard = next((packs / "splits" / "valid").glob("*.parquet"))
    table = pq.read_table(shard)
    rows = [row | {"loss_mask": [0] * len(row["loss_mask"])} for row in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, schema=table.schema), shard)
    rewrite_manifest(packs)
    run = train_here(**{"dataset.nano3_packed_sft_dir": str(packs)})
    assert (run.exit_code, run.error["code"]) == (ExitCode.DATA, "nothing_to_validate")
    assert "the first 3 rows of the valid split" in run.error["problem"]
    assert not run.losses
    assert not run.valid_losses


def test_a_loss_that_is_not_finite_stops_before_the_step(train: Train) -> None:
    run = train(**{"optimizer.lr": 1e30, "recipe.tensor_model_parallel_size": 2})
    assert (run.error["code"], run.error["exit_code"]) == ("loss_not_finite", ExitCode.NUMERIC)
    assert run.error["problem"].startswith("iteration 3")


def test_memory_that_runs_out_is_no_defect_and_names_what_makes_room(train_here: Train) -> None:
    run = train_here(**{"peft.dim": 10**11})
    assert (run.exit_code, run.error["code"]) == (ExitCode.FAILED, "out_of_memory")
    assert run.error["problem"].startswith("after step 0: ")
    assert "recipe.recompute_granularity=full" in run.error["fix"]


def test_a_rerun_keeps_the_earlier_run_beside_it(train_here: Train, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = train_here(**{"checkpoint.save": str(output), "train.train_iters": 2})
    second = train_here(**{"checkpoint.save": str(output), "train.train_iters": 3})
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert (output / "iter_0000003").is_dir()
    assert (tmp_path / "out.previous" / "iter_0000002").is_dir()


def rewrite_manifest(directory: Path) -> None:
    """Write artifact.json again over changed files, as whoever made them would have."""
    artifact = read_artifact(directory, "packed_parquet")
    (directory / "artifact.json").unlink()
    write_artifact(
        directory,
        artifact_type=artifact.type,
        produced_by=artifact.produced_by,
        properties=artifact.properties,
    )
