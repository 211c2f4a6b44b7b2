"""The step as it is started: config file in, checkpoint or one error out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron.artifacts import read_artifact, verify_files
from nemotron.errors import ExitCode
from nemotron.steps._entry import run_step
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint, read_chat_template
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps.convert.hf_to_megatron.checks import STEP, check
from nemotron.steps.convert.hf_to_megatron.schema import Config
from nemotron.steps.convert.hf_to_megatron.step import run
from tests.conftest import SmallDisk


def _start(tmp_path: Path, capsys: pytest.CaptureFixture[str], **config: Any) -> tuple[int, str]:
    path = tmp_path / "train.yaml"
    values = {key: str(value) for key, value in config.items()}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    exit_code = run_step(STEP, Config, run, ["--config", str(path)])
    captured = capsys.readouterr()
    return exit_code, captured.out + captured.err


def test_the_step_converts_a_checkpoint_bit_by_bit(
    tmp_path: Path, base_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    exit_code, text = _start(tmp_path, capsys, hf_model_path=base_hf, output_dir=output)
    assert exit_code == 0, text
    artifact = read_artifact(output, "checkpoint_megatron")
    verify_files(output, artifact)
    source = HuggingFaceCheckpoint(base_hf)
    converted = open_megatron(output)
    assert base_fingerprint(MegatronWeights(converted)) == base_fingerprint(source)
    assert artifact.properties["base_fingerprint"] == base_fingerprint(source)
    assert artifact.properties["base_fingerprint"] in text
    assert [entry.type for entry in artifact.inputs] == ["checkpoint_hf"]
    assert converted.hf_dir is not None
    assert read_chat_template(converted.hf_dir) == read_chat_template(base_hf)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (converted.hf_dir / name).read_bytes() == (base_hf / name).read_bytes()


def test_a_full_disk_is_an_error_of_the_place_whatever_file_it_stops(
    tmp_path: Path, base_hf: Path, capsys: pytest.CaptureFixture[str], small_disk: SmallDisk
) -> None:
    stopped = set[str]()
    for num_pages in itertools.count(2):
        output = small_disk(num_pages * os.sysconf("SC_PAGE_SIZE")) / "out"
        exit_code, text = _start(tmp_path, capsys, hf_model_path=base_hf, output_dir=output)
        if exit_code == ExitCode.OK:
            verify_files(output, read_artifact(output, "checkpoint_megatron"))
            break
        assert exit_code == ExitCode.IO, text
        what, where, fix = text.splitlines()[-3:]
        assert what == "error[input_output_failed]: No space left on device"
        assert where.startswith(f"  where: {output.parent}/")
        assert fix.startswith("  fix: free space there")
        assert not output.exists()
        left = list((output.with_name(".out.partial") / "iter_0000000").glob("*"))
        stopped |= {max(left, key=lambda path: path.stat().st_mtime_ns).name} if left else set()
    assert stopped >= {"__0_0.distcp", "common.pt", "train_state.pt"}


def test_the_step_refuses_pickled_weights_and_writes_nothing(
    tmp_path: Path, base_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in base_hf.glob("model*"):
        path.unlink()
    (base_hf / "pytorch_model.bin").write_bytes(b"x")
    exit_code, text = _start(tmp_path, capsys, hf_model_path=base_hf, output_dir=tmp_path / "out")
    assert exit_code == ExitCode.DATA
    assert "error[pickled_weights]" in text
    assert not (tmp_path / "out").exists()


def test_the_step_names_a_truncated_shard(
    tmp_path: Path, base_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(base_hf.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    exit_code, text = _start(tmp_path, capsys, hf_model_path=base_hf, output_dir=tmp_path / "out")
    assert exit_code == ExitCode.DATA
    assert "error[artifact_damaged]" in text
    assert shard.name in text


def test_the_step_names_a_source_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, text = _start(
        tmp_path, capsys, hf_model_path=tmp_path / "no", output_dir=tmp_path / "out"
    )
    assert exit_code == ExitCode.PREFLIGHT
    assert "error[missing_hf_checkpoint]" in text
    assert "hf download" in text


def test_the_step_verifies_a_source_that_carries_digests(
    tmp_path: Path, base_hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = {
        "type": "checkpoint_hf",
        "produced_by": {"step": "x", "config_sha256": "0", "code_version": "0"},
        "files": [{"path": "config.json", "size_bytes": 1, "blake3": "0"}],
    }
    (base_hf / "artifact.json").write_text(json.dumps(manifest), encoding="utf-8")
    exit_code, text = _start(tmp_path, capsys, hf_model_path=base_hf, output_dir=tmp_path / "out")
    assert exit_code == ExitCode.DATA
    assert "config.json is" in text


def test_an_output_inside_of_the_input_is_refused(tmp_path: Path) -> None:
    config = Config(hf_model_path=tmp_path, output_dir=tmp_path / "megatron")
    errors = check(config)
    assert [error.code for error in errors] == ["output_path_overlaps_inputs"]
    assert errors[0].exit_code == ExitCode.USAGE
    assert check(Config(hf_model_path=tmp_path / "a", output_dir=tmp_path / "b")) == []


@pytest.mark.parametrize("is_misread", [False, True])
def test_a_model_that_megatron_itself_would_misread_is_converted_with_a_warning(
    tmp_path: Path,
    save_base: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    is_misread: bool,
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16 if is_misread else 8192,
    }
    save_base(tmp_path / "hf", rope_parameters=rope, max_position_embeddings=16384)
    exit_code, text = _start(
        tmp_path, capsys, hf_model_path=tmp_path / "hf", output_dir=tmp_path / "out"
    )
    assert exit_code == 0
    assert ("warning: Megatron's constants" in text) is is_misread
    assert open_megatron(tmp_path / "out").config == HuggingFaceCheckpoint(tmp_path / "hf").config
