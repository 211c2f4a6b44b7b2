"""Merged checkpoints against PEFT: what they compute, and what they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from nemotron.artifacts import read_artifact, verify_files
from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import (
    HuggingFaceCheckpoint,
    read_chat_template,
    read_config,
)
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps._formats.megatron_adapter_writer import write_megatron_adapter
from nemotron.steps._formats.megatron_writer import publish_megatron
from nemotron.steps._formats.weights import row_blocks
from nemotron.steps._models.families import in_both_spellings
from nemotron.steps.convert.merge_lora.merge import add_delta, rms_change
from tests.steps._formats.harm import resign
from tests.steps._formats.plain_lora import PLAIN, save_plain_lora
from tests.steps.convert.merge_lora.conftest import PRODUCER, error_of, merge_into

IDS = torch.arange(60).reshape(3, 20)
SaveBase = Callable[..., LlamaForCausalLM]
SaveAdapter = Callable[..., Path]


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_by_module_are_merged_as_peft_scales_them(
    tmp_path: Path, save_base: SaveBase, save_adapter: SaveAdapter, use_rslora: bool
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    model = save_base(base)
    alphas = {"decoder.layers.1.self_attention.linear_qkv": 1.5}
    adapter = save_adapter(
        tmp_path / "adapter", base, ranks=(3, 5), alphas=alphas, use_rslora=use_rslora
    )
    merge_into(adapter, base, output)
    wanted = _logits(PeftModel.from_pretrained(model, adapter))
    # As above.
    got = _logits(LlamaForCausalLM.from_pretrained(output))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    origin = read_artifact(output, "checkpoint_hf").properties["merged_from"]
    assert origin["use_rslora"] is use_rslora
    assert set(origin["rank_pattern"].values()) == {5}
    assert set(origin["alpha_pattern"].values()) == {1.5}


@pytest.mark.parametrize("kind", PLAIN)
def test_whatever_modules_peft_adapts_the_merge_is_pefts_own(
    tmp_path: Path, save_base: SaveBase, kind: str
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    save_base(base)
    model = save_plain_lora(base, tmp_path / "adapter", **PLAIN[kind])
    merge_into(tmp_path / "adapter", base, output, allow_unverified_base=True)
    theirs: Any = model.merge_and_unload()
    ours = LlamaForCausalLM.from_pretrained(output).state_dict()
    before = LlamaForCausalLM.from_pretrained(base).state_dict()
    wanted = theirs.state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, before[name]) == torch.equal(ours[name], before[name])
        # fp32: the same sum, of products in another order.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_the_merged_checkpoint_answers_as_peft_with_the_adapter(
    tmp_path: Path, save_base: SaveBase, save_adapter: SaveAdapter, is_tied: bool, kind: str
) -> None:
    base = tmp_path / "base"
    model = save_base(base, tie_word_embeddings=is_tied)
    adapter = save_adapter(tmp_path / "adapter", base)
    source = base
    if kind == "megatron":
        source = tmp_path / "megatron"
        weights = HuggingFaceCheckpoint(base)
        publish_megatron(
            source, weights, source=base, source_name="", produced_by=PRODUCER, inputs=[]
        )
    output = tmp_path / "out"
    merge_into(adapter, source, output)
    both: Any = LlamaForCausalLM.from_pretrained(output, output_loading_info=True)
    merged, report = both
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before = _logits(model)
    wanted = _logits(PeftModel.from_pretrained(model, adapter))
    assert (wanted - before).abs().max() > 0.1
    # fp32; base and adapter apart round each product once more than the merged weight does.
    torch.testing.assert_close(_logits(merged), wanted, rtol=0, atol=1e-5)


def test_both_backends_write_the_same_weights(
    tmp_path: Path, base_hf: Path, base_megatron: Path, adapter: Path
) -> None:
    merge_into(adapter, base_hf, tmp_path / "a")
    merge_into(adapter, base_megatron, tmp_path / "b")
    names = ("a", "b")
    first, second = (HuggingFaceCheckpoint(tmp_path / name) for name in names)
    assert base_fingerprint(first) == base_fingerprint(second)


def test_the_output_is_complete_and_its_artifact_tells_where_it_comes_from(
    tmp_path: Path, base_hf: Path, base_megatron: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    merge_into(adapter, base_megatron, output)
    assert read_config(output) == in_both_spellings(read_config(base_hf))
    for name in ("generation_config.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (base_hf / name).read_bytes()
    chat = [{"role": "user", "content": "a b"}]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a b"
    artifact = read_artifact(output, "checkpoint_hf")
    verify_files(output, artifact)
    merged = HuggingFaceCheckpoint(output)
    assert artifact.properties["base_fingerprint"] == base_fingerprint(merged)
    origin = artifact.properties["merged_from"]
    assert origin["base_fingerprint"] == base_fingerprint(HuggingFaceCheckpoint(base_hf))
    assert (origin["dim"], origin["alpha"]) == (3, 6.0)
    changes = [
        (merged.read(name) - HuggingFaceCheckpoint(base_hf).read(name))
        .square()
        .mean()
        .sqrt()
        .item()
        for name in merged.names
    ]
    # The change is taken before it is rounded into the sum: half an ulp of values near 8.
    assert origin["largest_rms_change"] == pytest.approx(max(changes), abs=1e-6)
    assert [entry.type for entry in artifact.inputs] == ["checkpoint_lora", "checkpoint_megatron"]
    assert all(entry.blake3 for entry in artifact.inputs)


def test_a_megatron_output_holds_the_same_weights(
    tmp_path: Path, base_megatron: Path, adapter: Path
) -> None:
    merge_into(adapter, base_megatron, tmp_path / "hf", output_megatron_path=tmp_path / "megatron")
    converted = open_megatron(tmp_path / "megatron")
    merged = HuggingFaceCheckpoint(tmp_path / "hf")
    assert base_fingerprint(MegatronWeights(converted)) == base_fingerprint(merged)
    only = tmp_path / "only"
    merge_into(adapter, base_megatron, tmp_path / "no", export_hf=False, output_megatron_path=only)
    assert open_megatron(only).artifact is not None
    assert not (tmp_path / "no").exists()


def test_bf16_weights_are_merged_in_fp32_and_cast_once(
    tmp_path: Path, save_base: SaveBase, save_adapter: SaveAdapter
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    save_base(base, dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, alpha=0.3)
    merge_into(adapter, base, output)
    name = "model.layers.1.mlp.up_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    lora_a, lora_b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    weight = HuggingFaceCheckpoint(base).read(f"{name}.weight")
    wanted = (weight.float() + 0.1 * (lora_b @ lora_a)).bfloat16()
    merged = HuggingFaceCheckpoint(output).read(f"{name}.weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, wanted)


@pytest.mark.parametrize("block_rows", [[2500], [1000, 1000, 500], [1, 2000, 499]])
def test_add_delta_gives_the_same_in_blocks_of_rows(block_rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2500, 6, generator=generator, dtype=torch.float64)
    lora_a = torch.randn(2, 6, generator=generator)
    lora_b = torch.randn(2500, 2, generator=generator)
    blocks = weight.float().split(block_rows)
    added = add_delta(blocks, lora_a, lora_b, scale=0.3, dtype=torch.float32)
    merged = torch.cat([block.clone() for block in added])
    delta = 0.3 * lora_b.double() @ lora_a.double()
    # fp32 against fp64: rounding of sums of values below 16.
    torch.testing.assert_close(merged.double(), weight + delta, rtol=0, atol=2e-6)
    rms = delta.square().mean().sqrt().item()
    assert rms_change(lora_a, lora_b, scale=-0.3) == pytest.approx(rms, rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(512, 3584), (333, 2064)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_has_the_same_bits_however_the_rows_of_the_base_come(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    lora_a = torch.randn(16, columns, generator=generator)
    lora_b = torch.randn(rows, 16, generator=generator)

    def merged(blocks: Iterable[Tensor]) -> Tensor:
        added = add_delta(blocks, lora_a, lora_b, scale=0.3, dtype=dtype)
        return torch.cat([block.clone() for block in added])

    whole = merged([weight])
    assert torch.equal(merged(row_blocks(weight)), whole)
    heads = (block for head in weight.split(128) for block in row_blocks(head))
    assert torch.equal(merged(heads), whole)


def test_an_adapter_brings_the_chat_template_that_it_was_trained_with(
    tmp_path: Path, base_hf: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = adapter / "iter_0000020"
    digest = hashlib.sha256(b"other").hexdigest()
    resign(saved, chat_template_sha256=digest)
    merge_into(adapter, base_hf, tmp_path / "warned")
    assert "was trained with a different chat template" in capsys.readouterr().err
    assert read_chat_template(tmp_path / "warned") == read_chat_template(base_hf)
    (saved / "chat_template.jinja").write_text("other", encoding="utf-8")
    resign(saved)
    merge_into(adapter, base_hf, tmp_path / "out")
    assert read_chat_template(tmp_path / "out") == "other"
    merge_into(adapter, base_hf, tmp_path / "bare", save_tokenizer=False)
    assert read_chat_template(tmp_path / "bare") is None


def test_an_adapter_of_others_brings_the_chat_template_that_lies_with_it(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    saved = adapter / "iter_0000020"
    (saved / "artifact.json").unlink()
    merge_into(saved, base_hf, tmp_path / "out", allow_unverified_base=True)
    assert read_chat_template(tmp_path / "out") == read_chat_template(base_hf)
    (saved / "chat_template.jinja").write_text("other", encoding="utf-8")
    for _ in range(2):  # the second time onto a base that has none
        merge_into(saved, base_hf, tmp_path / "own", allow_unverified_base=True)
        assert read_chat_template(tmp_path / "own") == "other"
        tokenizer = AutoTokenizer.from_pretrained(base_hf)
        tokenizer.chat_template = None
        (base_hf / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(base_hf)
        assert read_chat_template(base_hf) is None


def test_the_output_has_all_named_chat_templates_of_the_base(
    tmp_path: Path, base_hf: Path, save_adapter: SaveAdapter
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_hf)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(base_hf)
    adapter = save_adapter(tmp_path / "adapter", base_hf, chat_template_sha256=None)
    merge_into(adapter, base_hf, tmp_path / "out")
    got = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert got == {"default": "a", "tool_use": "b"}


def test_debug_prints_the_change_of_every_adapted_tensor(
    tmp_path: Path, base_hf: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_into(adapter, base_hf, tmp_path / "out", debug=True)
    out = capsys.readouterr().out
    assert out.count("root mean square change") == 14 + 1
    assert "14 of 21 tensors merged (r 3, alpha 6)" in out


def test_the_artifact_says_how_far_the_logits_are_apart(
    tmp_path: Path, base_hf: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    paths = {"output_hf_path": output / "hf", "output_megatron_path": output / "megatron"}
    merge_into(adapter, base_hf, **{"output": output / "hf", **paths})
    for path, kind in (
        (output / "hf", "checkpoint_hf"),
        (output / "megatron", "checkpoint_megatron"),
    ):
        found = read_artifact(path, kind).properties["verified"]
        assert found["largest_difference"] <= found["tolerance"] < 1e-4
        assert found["largest_change"] > 0.1
        assert found["num_tokens"] == 8


def test_an_adapter_of_megatron_bridge_merges_like_the_same_in_pefts_layout(
    tmp_path: Path, base_megatron: Path, base_hf: Path, adapter: Path
) -> None:
    opened = open_adapter(adapter / "iter_0000020", config=HuggingFaceCheckpoint(base_hf).config)
    (tmp_path / "theirs").mkdir()
    write_megatron_adapter(tmp_path / "theirs", opened, pretrained_checkpoint="x", iteration=7)
    (tmp_path / "out").mkdir()
    merge_into(adapter, base_megatron, tmp_path / "ours")
    error = error_of(tmp_path / "theirs", base_megatron, tmp_path / "out" / "hf")
    assert error.code == "base_model_mismatch"
    assert "does not record the fingerprint of its base" in error.problem
    allowed = {"allow_unverified_base": True}
    merge_into(tmp_path / "theirs", base_megatron, tmp_path / "out" / "a", **allowed)
    merge_into(tmp_path / "theirs" / "iter_0000007", base_hf, tmp_path / "out" / "b", **allowed)
    wanted = load_file(tmp_path / "ours" / "model.safetensors")
    for output in ("a", "b"):
        got = load_file(tmp_path / "out" / output / "model.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
