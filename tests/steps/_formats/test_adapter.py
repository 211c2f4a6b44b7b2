"""PEFT reads our adapters, and we read PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.steps._formats.adapter import find_adapter_dir, open_adapter, write_adapter
from nemotron.steps._models.config import DecoderConfig
from tests.steps._formats.conftest import random_factors
from tests.steps._formats.plain_lora import PLAIN, save_plain_lora

SaveLlama = Callable[..., LlamaForCausalLM]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def test_peft_loads_what_write_adapter_wrote(
    tmp_path: Path, save_llama: SaveLlama, config: DecoderConfig
) -> None:
    factors = random_factors()
    write_adapter(
        tmp_path,
        factors,
        config=config,
        dim=3,
        alpha=6,
        dropout=0.0,
        base_model_name_or_path=str(tmp_path / "hf"),
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    model = PeftModel.from_pretrained(base, tmp_path)
    loaded = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    written = load_file(tmp_path / WEIGHTS)
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor)
    q_proj: Any = base.get_submodule("model.layers.0.self_attn.q_proj")
    assert q_proj.scaling == {"default": 2.0}
    # The fused delta's rows of the first KV group: 2 query heads of 4 rows, then k.
    lora_a, lora_b = factors["decoder.layers.0.self_attention.linear_qkv"]
    fused = 2.0 * lora_b @ lora_a
    delta = q_proj.get_delta_weight("default")
    # Same products in another order of rows: fp32 rounding of 3 terms.
    torch.testing.assert_close(delta[:8], fused[:8], rtol=0, atol=1e-5)


def test_open_gives_back_what_write_adapter_got(tmp_path: Path, config: DecoderConfig) -> None:
    factors = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in random_factors().items()}
    write_adapter(
        tmp_path,
        factors,
        config=config,
        dim=3,
        alpha=4.5,
        dropout=0.1,
        base_model_name_or_path="base",
    )
    adapter = open_adapter(tmp_path, config=config)
    assert (adapter.dim, adapter.alpha, adapter.dropout) == (3, 4.5, 0.1)
    assert {adapter.scale(module) for module in adapter.modules} == {1.5}
    assert adapter.base_model_name_or_path == "base"
    assert adapter.target_modules == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    again = adapter.factors()
    assert again.keys() == factors.keys()
    for name, pair in factors.items():
        assert torch.equal(again[name][0], pair[0])
        assert torch.equal(again[name][1], pair[1])


def test_open_reads_what_peft_saved(
    tmp_path: Path, save_llama: SaveLlama, config: DecoderConfig
) -> None:
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "peft"))
    adapter = open_adapter(tmp_path / "peft", config=config)
    assert adapter.target_modules == ("down_proj", "q_proj")
    assert adapter.scale("model.layers.0.self_attn.q_proj") == 2.0
    assert set(adapter.modules) == {
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    lora_a, lora_b = adapter.read("model.layers.1.mlp.down_proj")
    down_proj: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    assert torch.equal(lora_a, down_proj.lora_A["default"].weight)
    assert lora_b.shape == (16, 4)


def _varied() -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of some linears only, of two ranks."""
    ranks = {
        "decoder.layers.0.self_attention.linear_qkv": 3,
        "decoder.layers.0.self_attention.linear_proj": 3,
        "decoder.layers.1.self_attention.linear_proj": 3,
        "decoder.layers.1.mlp.linear_fc1": 5,
    }
    return {name: random_factors(lora_rank=rank)[name] for name, rank in ranks.items()}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_adapts_exactly_our_modules_with_our_ranks_and_scales(
    tmp_path: Path, config: DecoderConfig, use_rslora: bool
) -> None:
    factors = _varied()
    write_adapter(
        tmp_path,
        factors,
        config=config,
        dim=3,
        alpha=6,
        dropout=0.0,
        base_model_name_or_path=str(tmp_path / "hf"),
        use_rslora=use_rslora,
        alphas={"decoder.layers.0.self_attention.linear_qkv": 7.5},
    )
    base = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    # Keys that are missing or left over are warnings of PEFT, and warnings are errors here.
    model = PeftModel.from_pretrained(base, tmp_path)
    peers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    layer_0, layer_1 = "model.layers.0", "model.layers.1"
    assert peers.keys() == {
        *(f"{layer_0}.self_attn.{leaf}_proj" for leaf in "qkvo"),
        f"{layer_1}.self_attn.o_proj",
        f"{layer_1}.mlp.gate_proj",
        f"{layer_1}.mlp.up_proj",
    }
    adapter = open_adapter(tmp_path, config=config)
    assert set(adapter.modules) == peers.keys()
    for name, peer in peers.items():
        assert adapter.scale(name) == pytest.approx(peer.scaling["default"], rel=1e-15)  # type: ignore[index]
    root = (lambda value: value**0.5) if use_rslora else float
    assert adapter.scale(f"{layer_0}.self_attn.q_proj") == 7.5 / root(3)
    assert adapter.scale(f"{layer_0}.self_attn.o_proj") == 6 / root(3)
    assert adapter.scale(f"{layer_1}.mlp.gate_proj") == 6 / root(5)
    again = adapter.factors()
    assert again.keys() == factors.keys()
    assert all(torch.equal(again[name][1], lora_b) for name, (_, lora_b) in factors.items())


def test_open_reads_pefts_own_patterns(tmp_path: Path, config: DecoderConfig) -> None:
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={r"layers\.0\..*_proj": 2, "q_proj": 3},
        alpha_pattern={"down_proj": 5},
    )
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "peft"))
    adapter = open_adapter(tmp_path / "peft", config=config)
    assert len(adapter.modules) == 4
    for name in adapter.modules:
        peer: Any = model.get_submodule(name)
        assert adapter.scale(name) == pytest.approx(peer.scaling["default"], rel=1e-15)
        assert len(adapter.read(name)[0]) == peer.r["default"]


@pytest.mark.parametrize("kind", PLAIN)
def test_open_adapts_exactly_the_modules_that_peft_adapts(
    tmp_path: Path, config: DecoderConfig, kind: str
) -> None:
    model = save_plain_lora(tmp_path / "hf", tmp_path / "peft", **PLAIN[kind])
    peers: dict[str, Any] = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    adapter = open_adapter(tmp_path / "peft", config=config)
    assert set(adapter.modules) == peers.keys()
    for name, peer in peers.items():
        lora_a, lora_b = adapter.read(name)
        assert torch.equal(lora_a, peer.lora_A["default"].weight)
        assert torch.equal(lora_b, peer.lora_B["default"].weight)
        assert adapter.scale(name) == pytest.approx(peer.scaling["default"], rel=1e-15)


def test_find_adapter_dir_follows_the_tracker_and_nothing_else(adapter: Path) -> None:
    root = adapter.parent / "run"
    saved = root / "iter_0000020"
    saved.mkdir(parents=True)
    assert find_adapter_dir(adapter) == adapter
    assert find_adapter_dir(root) is None
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("20\n", encoding="utf-8")
    assert find_adapter_dir(root) is None
    (saved / CONFIG).write_text("{}", encoding="utf-8")
    assert find_adapter_dir(root) == saved
    assert find_adapter_dir(saved) == saved
    tracker.write_text("30", encoding="utf-8")
    assert find_adapter_dir(root) is None
