"""``nemotron adapter``: what is verified, what differs, what is written in another layout."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from nemotron.artifacts import Producer, read_artifact, verify_files
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._adapter import diff, export, verify
from nemotron.steps._adapter.schema import DiffConfig, ExportConfig, VerifyConfig
from tests.conftest import SmallDisk
from tests.steps._formats.harm import HARMS, resign
from tests.steps._formats.plain_lora import PLAIN, save_plain_lora
from tests.steps.convert.conftest import SaveAdapter

PRODUCER = Producer(step="test", config_sha256="0" * 64, code_version="0")
Output = pytest.CaptureFixture[str]


def verified(capsys: Output, adapter: Path, base: Path | None) -> dict[str, Any]:
    capsys.readouterr()
    verify.run(VerifyConfig(adapter=adapter, base=base, as_json=True), PRODUCER)
    return json.loads(capsys.readouterr().out)


def compared(capsys: Output, one: Path, other: Path, base: Path) -> dict[str, Any]:
    capsys.readouterr()
    config = DiffConfig(adapter=one, other=other, base=base, as_json=True)
    diff.run(config, PRODUCER)
    return json.loads(capsys.readouterr().out)


def exported(adapter: Path, output: Path, layout: Any, base: Path) -> None:
    export.run(ExportConfig(adapter=adapter, output=output, layout=layout, base=base), PRODUCER)


def test_verify_takes_either_base_and_finds_the_recorded_one(
    capsys: Output, adapter: Path, base_hf: Path, base_megatron: Path
) -> None:
    found = [verified(capsys, adapter, base) for base in (base_hf, base_megatron, None)]
    assert [each["base"] for each in found] == [str(base_hf), str(base_megatron), str(base_hf)]
    for each in found:
        assert each["base_is_verified"]
        assert each["files_are_verified"]
        assert (each["layout"], each["dim"], each["alpha"]) == ("peft", 3, 6.0)
        assert (each["num_modules"], each["valid_loss"], each["iteration"]) == (14, 1.5, 20)


def test_verify_says_what_cannot_be_verified(capsys: Output, adapter: Path, base_hf: Path) -> None:
    (adapter / "iter_0000020" / "artifact.json").unlink()
    found = verified(capsys, adapter, base_hf)
    assert not found["base_is_verified"]
    assert not found["files_are_verified"]
    verify.run(VerifyConfig(adapter=adapter, base=base_hf), PRODUCER)
    page = capsys.readouterr().out
    assert "the adapter records no fingerprint" in page
    assert "no artifact.json" in page
    assert "never measured" in page
    assert "merge     only with allow_unverified_base=true" in page
    assert found["merge_needs"] == ["allow_unverified_base=true"]


def test_verify_says_that_a_merge_asks_for_a_held_out_loss(
    capsys: Output, adapter: Path, base_hf: Path
) -> None:
    assert verified(capsys, adapter, base_hf)["merge_needs"] == []
    resign(adapter / "iter_0000020", valid_loss=None)
    assert verified(capsys, adapter, base_hf)["merge_needs"] == ["allow_unvalidated=true"]


def test_verify_says_that_a_merge_asks_for_a_tokenizer(
    capsys: Output, adapter: Path, base_megatron: Path
) -> None:
    assert verified(capsys, adapter, base_megatron)["merge_needs"] == []
    shutil.rmtree(base_megatron / "hf")
    (base_megatron / "artifact.json").unlink()
    assert verified(capsys, adapter, base_megatron)["merge_needs"] == ["hf_model_path=DIR"]


def test_verify_refuses_a_base_with_a_changed_byte(adapter: Path, base_megatron: Path) -> None:
    path = base_megatron / "iter_0000000" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(NemotronError) as caught:
        verify.run(VerifyConfig(adapter=adapter, base=base_megatron), PRODUCER)
    assert (caught.value.code, caught.value.exit_code) == ("artifact_damaged", ExitCode.DATA)
    assert "__0_0.distcp" in caught.value.problem


def test_verify_refuses_a_base_with_another_tokenizer(adapter: Path, base_hf: Path) -> None:
    path = base_hf / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(NemotronError) as caught:
        verify.run(VerifyConfig(adapter=adapter, base=base_hf), PRODUCER)
    assert caught.value.code == "base_model_mismatch"
    assert "tokenizer.json is not the tokenizer" in caught.value.problem


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_verify_refuses_a_harmful_adapter_even_with_digests_that_fit(
    adapter: Path, base_hf: Path, harm: Callable[[Path], None]
) -> None:
    harm(adapter / "iter_0000020")
    resign(adapter / "iter_0000020")
    with pytest.raises(NemotronError) as caught:
        verify.run(VerifyConfig(adapter=adapter, base=base_hf), PRODUCER)
    assert (caught.value.code, caught.value.exit_code) == (HARMS[harm], ExitCode.DATA)


def test_verify_asks_for_a_base_that_is_not_here(adapter: Path, base_hf: Path) -> None:
    shutil.move(base_hf, base_hf.with_name("elsewhere"))
    with pytest.raises(NemotronError) as caught:
        verify.run(VerifyConfig(adapter=adapter), PRODUCER)
    assert caught.value.code == "base_missing"
    assert "--base DIR" in caught.value.fix


def test_diff_compares_what_is_added_to_the_weights_not_the_factors(
    tmp_path: Path, capsys: Output, adapter: Path, base_hf: Path
) -> None:
    one = adapter / "iter_0000020"
    other = Path(shutil.copytree(one, tmp_path / "other"))
    assert compared(capsys, one, other, base_hf)["relative_difference"] == 0.0
    # Twice lora_A and half of lora_B add the same; a changed value does not.
    weights = other / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        tensors[name].mul_(2.0 if "lora_A" in name else 0.5)
    rewrite(weights, tensors)
    assert compared(capsys, one, other, base_hf)["relative_difference"] < 1e-7
    name = "model.layers.1.mlp.down_proj"
    lora_a = tensors[f"base_model.model.{name}.lora_A.weight"]
    lora_b = tensors[f"base_model.model.{name}.lora_B.weight"]
    before = 2.0 * lora_b @ lora_a
    lora_b[3, 1] += 1.0
    rewrite(weights, tensors)
    found = compared(capsys, one, other, base_hf)
    wanted = (2.0 * lora_b @ lora_a - before).norm().item()
    assert found["modules"][name]["difference"] == pytest.approx(wanted, rel=1e-5)
    assert found["modules"][name]["norm"] == pytest.approx(before.norm().item(), rel=1e-5)
    diff.run(DiffConfig(adapter=one, other=other, base=base_hf), PRODUCER)
    assert f"{name}: " in capsys.readouterr().out


def test_diff_counts_a_module_that_one_is_not_on_as_one_that_adds_nothing(
    tmp_path: Path, capsys: Output, adapter: Path, base_hf: Path
) -> None:
    one = adapter / "iter_0000020"
    other = Path(shutil.copytree(one, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    rewrite(other / "adapter_model.safetensors", kept)
    path = other / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"target_modules": ["q_proj"]}
    path.write_text(json.dumps(values), encoding="utf-8")
    resign(other)
    name = "model.layers.1.mlp.down_proj"
    lora_a, lora_b = (
        tensors[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB"
    )
    norm = (2.0 * lora_b @ lora_a).norm().item()
    for first, second, key, first_norm in (
        (one, other, "only_in_first", norm),
        (other, one, "only_in_second", 0.0),
    ):
        found = compared(capsys, first, second, base_hf)
        assert name in found[key]
        assert found["relative_difference"] > 0.5
        assert found["modules"][name]["difference"] == pytest.approx(norm, rel=1e-12)
        assert found["modules"][name]["norm"] == pytest.approx(first_norm, rel=1e-12)
    diff.run(DiffConfig(adapter=one, other=other, base=base_hf), PRODUCER)
    assert "modules that differ: 12 of 14" in capsys.readouterr().out


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    resign(path.parent)


def test_export_writes_both_layouts_and_comes_back_the_same(
    tmp_path: Path, capsys: Output, adapter: Path, base_hf: Path, base_megatron: Path
) -> None:
    theirs, again = tmp_path / "out" / "theirs", tmp_path / "out" / "again"
    exported(adapter, theirs, "megatron_bridge", base_megatron)
    assert (theirs / "iter_0000020" / ".metadata").is_file()
    found = verified(capsys, theirs, base_hf)
    assert (found["layout"], found["base_is_verified"]) == ("megatron_bridge", True)
    exported(theirs, again, "peft", base_hf)
    assert compared(capsys, adapter, again, base_hf)["relative_difference"] == 0.0
    verify_files(again, read_artifact(again, "checkpoint_lora"))
    name = "adapter_model.safetensors"
    wanted, got = load_file(adapter / "iter_0000020" / name), load_file(again / name)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    ids = torch.arange(20).unsqueeze(0)
    logits = []
    for directory in (adapter / "iter_0000020", again):
        base = LlamaForCausalLM.from_pretrained(base_hf)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, directory)(ids).logits)
    assert torch.equal(*logits)


def test_export_of_rslora_whose_scale_is_rounded_on_the_way_succeeds(
    tmp_path: Path, capsys: Output, base_hf: Path, save_adapter: SaveAdapter
) -> None:
    # 26 / sqrt(12) * 12 / 12 is not 26 / sqrt(12).
    source = save_adapter(
        tmp_path / "source", base_hf, dim=12, alpha=26, use_rslora=True, ranks=(12, 12)
    )
    exported(source, tmp_path / "out", "megatron_bridge", base_hf)
    found = compared(capsys, source, tmp_path / "out", base_hf)
    # The root of a difference of squares, which fp64 rounds to 1e-16.
    assert 0 < found["relative_difference"] < 1e-7


@pytest.mark.parametrize("kind", PLAIN)
def test_export_of_what_peft_saved_answers_as_peft_with_it(
    tmp_path: Path, capsys: Output, base_hf: Path, kind: str
) -> None:
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        wanted = save_plain_lora(base_hf, tmp_path / "peft", **PLAIN[kind])(ids).logits
    exported(tmp_path / "peft", tmp_path / "out", "peft", base_hf)
    base = LlamaForCausalLM.from_pretrained(base_hf)
    with torch.no_grad():
        got = PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
    assert torch.equal(got, wanted)


def test_export_says_at_which_size_megatron_bridge_reads_parts_that_have_their_own_lora_a(
    tmp_path: Path, capsys: Output, adapter: Path, base_hf: Path
) -> None:
    exported(adapter, tmp_path / "fused", "megatron_bridge", base_hf)
    assert "tensor-parallel" not in capsys.readouterr().err
    weights = adapter / "iter_0000020" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].mul_(2.0)
    rewrite(weights, tensors)
    exported(adapter, tmp_path / "canonical", "megatron_bridge", base_hf)
    assert "load it at tensor-parallel size 1" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["megatron_bridge", "peft"])
def test_what_export_writes_knows_its_base(
    tmp_path: Path, capsys: Output, adapter: Path, base_megatron: Path, layout: str
) -> None:
    (tmp_path / "base_hf").rename(tmp_path / "elsewhere")  # as the adapter names it
    first, second = tmp_path / "out" / "first", tmp_path / "out" / "second"
    exported(adapter, first, layout, base_megatron)
    assert verified(capsys, first, None)["base"] == str(base_megatron)
    export.run(ExportConfig(adapter=first, output=second, layout="peft"), PRODUCER)
    assert verified(capsys, second, None)["base_is_verified"]


@pytest.mark.parametrize("layout", ["megatron_bridge", "peft"])
def test_export_onto_a_full_disk_says_that_it_is_full_whatever_file_it_stops(
    adapter: Path, base_hf: Path, small_disk: SmallDisk, layout: str
) -> None:
    failures: list[int | None] = []
    while True:
        output = small_disk((2 + len(failures)) * os.sysconf("SC_PAGE_SIZE")) / "out"
        try:
            exported(adapter, output, layout, base_hf)
            break
        except OSError as error:
            failures.append(error.errno)
            assert not output.exists()
    assert len(failures) > 3
    assert set(failures) == {errno.ENOSPC}
    verify_files(output, read_artifact(output, "checkpoint_lora"))


def test_export_refuses_to_write_over_its_inputs(adapter: Path, base_hf: Path) -> None:
    with pytest.raises(NemotronError) as caught:
        exported(adapter, adapter, "peft", base_hf)
    assert caught.value.code == "output_path_overlaps_inputs"
