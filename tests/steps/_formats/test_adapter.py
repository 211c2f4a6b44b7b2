"""PEFT reads our adapters, we read PEFT's, and adapters that would do harm are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.adapter import find_adapter_dir, open_adapter, write_adapter
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.config import DecoderConfig
from tests.steps._formats.plain_lora import PLAIN, save_plain_lora

SaveLlama = Callable[..., LlamaForCausalLM]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPES = {  # [R, in features], [out features, R] of the model that save_llama makes
    "self_attention.linear_qkv": (16, 32),
    "self_attention.linear_proj": (16, 16),
    "mlp.linear_fc1": (16, 48),
    "mlp.linear_fc2": (24, 16),
}


def _factors(*targets: str, lora_rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"decoder.layers.{layer}.{name}": (
            torch.randn(lora_rank, SHAPES[name][0], generator=generator),
            torch.randn(SHAPES[name][1], lora_rank, generator=generator),
        )
        for layer in range(2)
        for name in targets or SHAPES
    }


@pytest.fixture
def config(tmp_path: Path, save_llama: SaveLlama) -> DecoderConfig:
    save_llama(tmp_path / "hf")
    return HuggingFaceCheckpoint(tmp_path / "hf").config


@pytest.fixture
def adapter(tmp_path: Path, config: DecoderConfig) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    write_adapter(
        directory,
        _factors("self_attention.linear_qkv", "self_attention.linear_proj"),
        config=config,
        dim=3,
        alpha=6,
        dropout=0.1,
        base_model_name_or_path="base",
    )
    return directory


def _error(directory: Path, config: DecoderConfig) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        open_adapter(directory, config=config)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


def _change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def _change_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(values), encoding="utf-8")


def test_peft_loads_what_write_adapter_wrote(
    tmp_path: Path, save_llama: SaveLlama, config: DecoderConfig
) -> None:
    factors = _factors()
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
    factors = {name: (a.bfloat16(), b.bfloat16()) for name, (a, b) in _factors().items()}
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
    return {name: _factors(lora_rank=rank)[name] for name, rank in ranks.items()}


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


def test_open_refuses_tensors_that_the_layers_of_the_config_leave_out(
    adapter: Path, config: DecoderConfig
) -> None:
    _change_config(adapter, layers_to_transform=[0])
    assert _error(adapter, config).code == "adapter_keys_unexpected"


# What says how an adapter is trained, loaded or found, and not what it adds to the weights.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("ensure_weight_tying", "qalora_group_size", "runtime_config", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # see init_lora_weights
    *("megatron_config", "megatron_core"),  # of Megatron's linears, which have other names
}


@pytest.mark.parametrize("field", [field.name for field in fields(LoraConfig)])
def test_every_field_of_peft_is_honoured_refused_or_without_effect(
    adapter: Path, config: DecoderConfig, field: str
) -> None:
    _change_config(adapter, **{field: {"a field": "of a later day"}})
    if field in WITHOUT_EFFECT:
        open_adapter(adapter, config=config)
    else:
        with pytest.raises(NemotronError, match=field):
            open_adapter(adapter, config=config)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_open_names_a_missing_half(adapter: Path, config: DecoderConfig, half: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if half in name:
                tensors.pop(name)

    _change_weights(adapter, drop)
    error = _error(adapter, config)
    assert error.code == "adapter_half_missing"
    assert f"all 8 tensors *.{half}.weight are missing" in error.problem


def test_open_names_a_missing_tensor(adapter: Path, config: DecoderConfig) -> None:
    _change_weights(adapter, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"))
    error = _error(adapter, config)
    assert error.code == "adapter_keys_missing"
    assert f"1 of 16 tensors are missing, first {Q_PROJ}.lora_B.weight" in error.problem


def test_open_names_a_wrong_prefix(adapter: Path, config: DecoderConfig) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    _change_weights(adapter, rename)
    error = _error(adapter, config)
    assert error.code == "adapter_prefix"
    assert "prefix 'model.'; wanted 'base_model.model.model.'" in error.problem


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}]
)
def test_open_names_a_scale_that_was_changed_after_the_save(
    adapter: Path, config: DecoderConfig, changes: dict[str, Any]
) -> None:
    _change_config(adapter, **changes)
    error = _error(adapter, config)
    assert error.code == "adapter_alpha"
    assert f"{next(iter(changes))} is " in error.problem


def test_open_names_an_extra_key(adapter: Path, config: DecoderConfig) -> None:
    extra = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    _change_weights(adapter, lambda tensors: tensors.update({extra: torch.zeros(3, 16)}))
    error = _error(adapter, config)
    assert error.code == "adapter_keys_unexpected"
    assert extra in error.problem
    assert "closest: base_model.model.model.layers." in error.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_open_names_values_that_are_not_finite(
    adapter: Path, config: DecoderConfig, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_A.weight"][1, 2] = value

    _change_weights(adapter, spoil)
    error = _error(adapter, config)
    assert error.code == "adapter_not_finite"
    assert f"{Q_PROJ}.lora_A.weight" in error.problem


def test_open_refuses_a_rank_that_is_not_that_of_the_tensors(
    adapter: Path, config: DecoderConfig
) -> None:
    _change_config(adapter, r=4)
    error = _error(adapter, config)
    assert error.code == "adapter_rank"
    assert "r is 4; adapter_model.safetensors was saved with 3" in error.problem
    _change_weights(adapter, lambda _: None)  # as another writer leaves it
    error = _error(adapter, config)
    assert error.code == "adapter_rank"
    assert "lora_A.weight has rank 3; adapter_config.json says 4" in error.problem


def test_open_names_a_tensor_of_another_shape(adapter: Path, config: DecoderConfig) -> None:
    name = f"{Q_PROJ}.lora_B.weight"
    _change_weights(adapter, lambda tensors: tensors.update({name: torch.zeros(15, 3)}))
    error = _error(adapter, config)
    assert error.code == "adapter_shape"
    assert f"{name} is [15, 3]; its rank and the base ask for [16, 3]" in error.problem


def test_open_names_a_truncated_file(adapter: Path, config: DecoderConfig) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    error = _error(adapter, config)
    assert error.code == "artifact_damaged"
    assert str(path) in error.problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; wanted LORA"),
        ({"r": 0}, "r is 0; wanted a number of 1 or more"),
        ({"lora_alpha": None}, "lora_alpha is None; wanted a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": None}, "target_modules is .*; wanted a list of names or a pattern"),
        ({"target_modules": [3]}, r"target_modules is \[3\]; wanted a list of names"),
        ({"target_modules": ["q_porj"]}, r"named q_porj \(closest: q_proj\)"),
        ({"target_modules": "q_proj"}, "adapts no module .* the pattern 'q_proj'"),
        ({"target_modules": "q_(proj"}, r"target_modules: 'q_\(proj' is no pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embeddings or lm_head are not supported"),
        ({"target_modules": ".*embed_tokens"}, "embeddings or lm_head are not supported"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules is .*; wanted a list of names"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\]; wanted numbers"),
        ({"layers_to_transform": True}, "layers_to_transform is True; wanted numbers"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "layers_to_transform and layers_pattern need a list of names",
        ),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives q_proj 0; wanted a number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern gives q_proj 1.5"),
        ({"rank_pattern": {"q_(proj": 3}}, r"rank_pattern: 'q_\(proj' is no pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern gives q_proj '8'"),
        ({"rank_pattern": "x"}, "rank_pattern is 'x'; wanted numbers by module"),
        ({"alpha_pattern": ["a"]}, r"alpha_pattern is \['a'\]; wanted numbers by module"),
        ({"use_rslora": 1}, "use_rslora is 1; wanted true or false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_open_refuses_an_adapter_that_is_not_plain_lora(
    adapter: Path, config: DecoderConfig, changes: dict[str, Any], message: str
) -> None:
    _change_config(adapter, **changes)
    with pytest.raises(NemotronError, match=message) as caught:
        open_adapter(adapter, config=config)
    assert caught.value.code == "adapter_config"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_open_says_which_file_is_missing(adapter: Path, config: DecoderConfig, name: str) -> None:
    (adapter / name).unlink()
    error = _error(adapter, config)
    assert error.code == "adapter_missing"
    assert f"has no {name}" in error.problem


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
