"""Merges that are refused, each by its name, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.artifacts import write_artifact
from nemotron.errors import ExitCode
from nemotron.steps._formats import safetensors_file
from nemotron.steps.convert.merge_lora import merge
from nemotron.steps.convert.merge_lora.merge import add_delta
from tests.steps._formats.harm import HARMS, resign
from tests.steps.convert.merge_lora.conftest import PRODUCER, error_of, merge_into

SaveBase = Callable[..., LlamaForCausalLM]
SaveAdapter = Callable[..., Path]


def test_another_base_is_refused(tmp_path: Path, save_base: SaveBase, adapter: Path) -> None:
    save_base(tmp_path / "other", seed=7)
    for changes in ({}, {"allow_unverified_base": True}):
        error = error_of(adapter, tmp_path / "other", tmp_path / "out" / "hf", **changes)
        assert (error.code, error.exit_code) == ("base_model_mismatch", ExitCode.DATA)
        assert "was trained on" in error.problem


def test_another_megatron_base_is_refused(
    tmp_path: Path, base_megatron: Path, save_base: SaveBase, save_adapter: SaveAdapter
) -> None:
    save_base(tmp_path / "other", seed=7)
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "other")
    error = error_of(adapter, base_megatron, tmp_path / "out" / "hf")
    assert error.code == "base_model_mismatch"


def test_an_adapter_that_records_no_base_is_refused_unless_told(
    tmp_path: Path, base_hf: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = adapter / "iter_0000020"
    (saved / "artifact.json").unlink()
    error = error_of(saved, base_hf, tmp_path / "out" / "hf")
    assert error.code == "base_model_mismatch"
    assert "does not record the fingerprint of its base" in error.problem
    assert "allow_unverified_base=true" in error.fix
    merge_into(saved, base_hf, tmp_path / "out" / "hf", allow_unverified_base=True)
    seen = capsys.readouterr()
    assert f"does not record its base: whether that is {base_hf} was not checked" in seen.err
    assert f"merged {saved} into {base_hf}\n" in seen.out


def test_an_adapter_that_was_never_validated_is_refused_unless_told(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    resign(adapter / "iter_0000020", valid_loss=None)
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert (error.code, error.exit_code) == ("adapter_not_validated", ExitCode.DATA)
    merge_into(adapter, base_hf, tmp_path / "out" / "hf", allow_unvalidated=True)


def test_an_adapter_of_others_that_was_exported_is_as_foreign_as_before(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    directory, output = adapter / "iter_0000020", tmp_path / "out" / "hf"
    (directory / "artifact.json").unlink()
    write_artifact(directory, artifact_type="checkpoint_lora", produced_by=PRODUCER, properties={})
    assert error_of(adapter, base_hf, output).code == "base_model_mismatch"
    merge_into(adapter, base_hf, output, allow_unverified_base=True)
    assert (output / "model.safetensors").is_file()


def test_another_tokenizer_is_refused(tmp_path: Path, base_hf: Path, adapter: Path) -> None:
    path = base_hf / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert error.code == "base_model_mismatch"
    assert "tokenizer.json is not the tokenizer" in error.problem


def test_a_config_of_another_model_is_refused(
    tmp_path: Path, base_megatron: Path, base_hf: Path, adapter: Path
) -> None:
    path = base_hf / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-3}
    path.write_text(json.dumps(values), encoding="utf-8")
    output = tmp_path / "out" / "hf"
    error = error_of(adapter, base_megatron, output, hf_model_path=base_hf)
    assert error.code == "base_model_mismatch"
    assert "describes a different model than the base" in error.problem


def test_a_megatron_base_of_others_takes_config_and_tokenizer_from_hf_model_path(
    tmp_path: Path,
    base_megatron: Path,
    base_hf: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(base_megatron / "hf")
    (base_megatron / "artifact.json").unlink()
    output = tmp_path / "out" / "hf"
    with monkeypatch.context() as patch:  # it is refused before minutes are spent on a digest
        patch.setattr("nemotron.steps._adapter.opening.base_fingerprint", pytest.fail)
        error = error_of(adapter, base_megatron, output)
    assert error.code == "missing_model_files"
    assert "Set hf_model_path" in error.fix
    merge_into(adapter, base_megatron, output, hf_model_path=base_hf)
    assert (output / "tokenizer.json").is_file()


def test_missing_inputs_are_named(tmp_path: Path, base_hf: Path, adapter: Path) -> None:
    output = tmp_path / "out" / "hf"
    error = error_of(tmp_path / "no", base_hf, output)
    assert (error.code, error.exit_code) == ("missing_adapter", ExitCode.PREFLIGHT)
    error = error_of(adapter, tmp_path / "no", output)
    assert (error.code, error.exit_code) == ("missing_base_checkpoint", ExitCode.PREFLIGHT)


@pytest.mark.parametrize("output", ["run/merged", "base_hf", "base_hf/merged"])
def test_an_output_that_overlaps_an_input_is_refused(
    tmp_path: Path, base_hf: Path, adapter: Path, output: str
) -> None:
    error = error_of(adapter, base_hf, tmp_path / output)
    assert error.code == "output_path_overlaps_inputs"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_changed_byte_of_the_adapter_is_found_by_its_digest(
    tmp_path: Path, base_hf: Path, adapter: Path, name: str
) -> None:
    path = adapter / "iter_0000020" / name
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert (error.code, error.exit_code) == ("artifact_damaged", ExitCode.DATA)
    assert name in error.problem


def test_a_changed_alpha_is_found_by_its_digest(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    path = adapter / "iter_0000020" / "adapter_config.json"
    text = path.read_text(encoding="utf-8").replace('"lora_alpha": 6', '"lora_alpha": 9')
    path.write_text(text, encoding="utf-8")
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert error.code == "artifact_damaged"


def test_a_changed_byte_of_a_megatron_base_is_found_by_its_digest(
    tmp_path: Path, base_megatron: Path, adapter: Path
) -> None:
    path = base_megatron / "iter_0000000" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = error_of(adapter, base_megatron, tmp_path / "out" / "hf")
    assert error.code == "artifact_damaged"
    assert "__0_0.distcp" in error.problem


def test_a_changed_weight_of_a_base_without_digests_is_another_base(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    shard = sorted(base_hf.glob("model-*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-4] ^= 1
    shard.write_bytes(content)
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert error.code == "base_model_mismatch"


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_harmful_adapter_is_refused_even_with_digests_that_fit(
    tmp_path: Path, base_hf: Path, adapter: Path, harm: Callable[[Path], None]
) -> None:
    harm(adapter / "iter_0000020")
    resign(adapter / "iter_0000020")
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert (error.code, error.exit_code) == (HARMS[harm], ExitCode.DATA)


def test_a_merge_that_computes_something_else_is_not_published(
    tmp_path: Path, base_hf: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_scale(*inputs: Any, scale: float, dtype: torch.dtype) -> Any:
        return add_delta(*inputs, scale=1.01 * scale, dtype=dtype)

    monkeypatch.setattr(merge, "add_delta", forget_the_scale)
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert (error.code, error.exit_code) == ("merged_differs", ExitCode.NUMERIC)


def test_a_sum_that_does_not_fit_the_type_of_the_base_is_refused(
    tmp_path: Path, save_base: SaveBase, save_adapter: SaveAdapter
) -> None:
    save_base(tmp_path / "base", dtype=torch.float16)
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", alpha=3e7)
    error = error_of(adapter, tmp_path / "base", tmp_path / "out" / "hf")
    assert (error.code, error.exit_code) == ("merged_not_finite", ExitCode.NUMERIC)
    assert "model.layers.0" in error.problem


def test_a_merge_that_reads_back_otherwise_is_not_published(
    tmp_path: Path, base_hf: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_bit(tensor: Tensor) -> memoryview:
        return (tensor * 1.0001).reshape(-1).view(torch.uint8).numpy().data

    monkeypatch.setattr(safetensors_file, "raw_bytes", lose_a_bit)
    error = error_of(adapter, base_hf, tmp_path / "out" / "hf")
    assert error.code == "artifact_damaged"
    assert "differs from what was written when read back" in error.problem
