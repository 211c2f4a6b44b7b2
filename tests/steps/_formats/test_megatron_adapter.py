"""Adapters of Megatron-Bridge: every dialect of its checkpoints, and every refusal by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.lora import fused_factors
from nemotron.steps._formats.megatron_adapter import MegatronAdapter, open_megatron_adapter
from nemotron.steps._formats.megatron_adapter_writer import write_megatron_adapter
from nemotron.steps._formats.megatron_files import write_iteration_files
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import torch_dist_writer
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import lora_shapes
from tests.steps._formats.conftest import save_peft_adapter

SaveLlama = Callable[..., LlamaForCausalLM]
Tensors = dict[str, Tensor]
RANK, ALPHA = 3, 6
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
# Rows and columns of the fused linears of the Llama that save_llama makes.
SHAPES = {
    "self_attention.linear_qkv": (32, 16),
    "self_attention.linear_proj": (16, 16),
    "mlp.linear_fc1": (48, 16),
    "mlp.linear_fc2": (16, 24),
}


@pytest.fixture
def config(tmp_path: Path, save_llama: SaveLlama) -> DecoderConfig:
    save_llama(tmp_path / "hf")
    return HuggingFaceCheckpoint(tmp_path / "hf").config


def fused_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for linear, (rows, columns) in SHAPES.items():
        key = f"decoder.layers.{linear}.adapter"
        tensors[f"{key}.linear_in.weight"] = torch.randn(2, RANK, columns, generator=generator)
        tensors[f"{key}.linear_out.weight"] = torch.randn(2, rows, RANK, generator=generator)
    return tensors


def save(
    root: Path,
    tensors: Tensors,
    config: DecoderConfig,
    *,
    kind: str = "lora.LoRA",
    tp_size: int = 1,
    is_nested: bool = False,
    num_parts: int = 1,
    **changes: Any,
) -> Path:
    """Write a checkpoint as Megatron-Bridge does, whatever is in it.

    The size stands where builder configs have it, if nested; ``num_parts`` is into how many chunks
    rows of linear_fc1 are cut.
    """
    directory = root / "iter_0000020"
    directory.mkdir(parents=True)
    with torch_dist_writer(directory) as writer:
        for name, tensor in tensors.items():
            if num_parts == 1 or "linear_fc1" not in name or "linear_out" not in name:
                writer.write(name, tensor)
                continue
            for number, part in enumerate(tensor.chunk(num_parts, dim=1)):
                place = (0, number * part.shape[1], 0)
                writer.write(name, part, offsets=place, global_shape=tensor.shape)
    peft = {"_target_": f"megatron.bridge.peft.{kind}", "dim": RANK, "alpha": ALPHA}
    model = config.to_run_config(dtype_name="float32", source_name="x")
    size = {"tensor_model_parallel_size": tp_size}
    run_config = {
        "model": {**model, **({"transformer": size} if is_nested else size)},
        "peft": {**peft, "target_modules": TARGETS, **changes},
        "checkpoint": {"pretrained_checkpoint": "bases/llama"},
    }
    write_iteration_files(root, directory, run_config, iteration=20)
    return root


def refused(root: Path, config: DecoderConfig) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        open_megatron_adapter(root, config=config)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


def assert_same_factors(one: MegatronAdapter, other: MegatronAdapter) -> None:
    assert one.modules == other.modules
    for module in one.modules:
        for a, b in zip(one.read(module), other.read(module), strict=True):
            assert torch.equal(a, b)


def test_stacked_layers_and_layers_of_their_own_read_the_same(
    tmp_path: Path, config: DecoderConfig
) -> None:
    stacked = fused_tensors()
    single = {
        name.replace("layers.", f"layers.{layer}."): tensor[layer]
        for name, tensor in stacked.items()
        for layer in range(2)
    }
    one = open_megatron_adapter(save(tmp_path / "one", stacked, config), config=config)
    other = open_megatron_adapter(save(tmp_path / "other", single, config), config=config)
    assert one.modules == tuple(lora_shapes(config))
    assert (one.dim, one.alpha, one.scale(one.modules[0])) == (RANK, ALPHA, 2.0)
    assert one.base_model_name_or_path == "bases/llama"
    assert_same_factors(one, other)


def test_the_delta_of_a_fused_linear_is_the_product_of_its_tensors(
    tmp_path: Path, config: DecoderConfig
) -> None:
    tensors = fused_tensors()
    adapter = open_megatron_adapter(save(tmp_path / "x", tensors, config), config=config)
    for layer in range(2):
        factors = fused_factors(adapter, layer)
        for linear in SHAPES:
            lora_a, lora_b = factors[f"decoder.layers.{layer}.{linear}"]
            key = f"decoder.layers.{linear}.adapter"
            assert torch.equal(lora_a, tensors[f"{key}.linear_in.weight"][layer])
            assert torch.equal(lora_b, 2.0 * tensors[f"{key}.linear_out.weight"][layer])


def canonical_tensors(config: DecoderConfig, *, tp_size: int) -> tuple[Tensors, Tensors]:
    """Return checkpoint tensors of a CanonicalLoRA, and the factors they hold by module."""
    generator = torch.Generator().manual_seed(0)
    parts = {
        "self_attn.q_proj": "self_attention.linear_qkv.adapter.adapter_q",
        "self_attn.v_proj": "self_attention.linear_qkv.adapter.adapter_v",
        "mlp.up_proj": "mlp.linear_fc1.adapter.adapter_up",
        "mlp.down_proj": "mlp.linear_fc2.adapter",
    }
    tensors: Tensors = {}
    factors: Tensors = {}
    for module, key in parts.items():
        rows, columns = lora_shapes(config)[f"model.layers.0.{module}"]
        lora_a = torch.randn(2, RANK, columns, generator=generator)
        lora_b = torch.randn(2, rows, RANK, generator=generator)
        factors |= {f"{module}.a": lora_a, f"{module}.b": lora_b}
        if "linear_fc1" in key:  # each rank's shard is saved as two halves, all first halves first
            shards = lora_b.chunk(tp_size, dim=1)
            halves = [shard.chunk(2, dim=1) for shard in shards]
            lora_b = torch.cat([half[part] for part in range(2) for half in halves], dim=1)
        tensors[f"decoder.layers.{key}.linear_in.weight"] = lora_a
        tensors[f"decoder.layers.{key}.linear_out.weight"] = lora_b
    return tensors, factors


@pytest.mark.parametrize(
    ("tp_size", "num_parts", "is_nested"),
    [(1, 2, False), (2, 4, True), (4, 8, False), (4, 1, True)],
)
def test_canonical_lora_reads_by_part_in_the_order_of_the_module(
    tmp_path: Path, config: DecoderConfig, tp_size: int, num_parts: int, is_nested: bool
) -> None:
    tensors, factors = canonical_tensors(config, tp_size=tp_size)
    targets = ["linear_q", "*.linear_v", "linear_fc1_up", "linear_fc2"]
    kind = "canonical_lora.CanonicalLoRA"
    root = save(
        tmp_path / "x",
        tensors,
        config,
        kind=kind,
        tp_size=tp_size,
        is_nested=is_nested,
        num_parts=num_parts,
        target_modules=targets,
    )
    adapter = open_megatron_adapter(root, config=config)
    assert adapter.target_modules == ("down_proj", "q_proj", "up_proj", "v_proj")
    for name in adapter.modules:
        layer, module = int(name.split(".")[2]), name.split(".", 3)[3]
        lora_a, lora_b = adapter.read(name)
        assert torch.equal(lora_a, factors[f"{module}.a"][layer])
        assert torch.equal(lora_b, factors[f"{module}.b"][layer])
    # As one pair of factors per fused linear: the same change of the weight, rows in its order.
    lora_a, lora_b = fused_factors(adapter, 1)["decoder.layers.1.self_attention.linear_qkv"]
    delta = (lora_b @ lora_a).unflatten(0, (2, 4, 4))  # groups; two queries, key, value; features
    query = 2.0 * factors["self_attn.q_proj.b"][1] @ factors["self_attn.q_proj.a"][1]
    torch.testing.assert_close(delta[:, :2].flatten(0, 2), query)
    assert not delta[:, 2].any()


def test_canonical_lora_of_another_size_than_its_config_says_is_refused(
    tmp_path: Path, config: DecoderConfig
) -> None:
    tensors, _ = canonical_tensors(config, tp_size=2)
    targets = ["linear_q", "linear_v", "linear_fc1_up", "linear_fc2"]
    kind = "canonical_lora.CanonicalLoRA"
    root = save(tmp_path, tensors, config, kind=kind, num_parts=4, target_modules=targets)
    error = refused(root, config)
    assert error.code == "adapter_config"
    assert "at tensor-parallel size 2, but run_config.yaml says 1" in error.problem


def test_write_megatron_adapter_writes_canonical_lora_where_parts_do_not_share(
    tmp_path: Path, config: DecoderConfig
) -> None:
    tensors, _ = canonical_tensors(config, tp_size=1)
    targets = ["linear_q", "linear_v", "linear_fc1_up", "linear_fc2"]
    kind = "canonical_lora.CanonicalLoRA"
    root = save(tmp_path / "x", tensors, config, kind=kind, target_modules=targets)
    (tmp_path / "again").mkdir()
    adapter = open_megatron_adapter(root, config=config)
    written = write_megatron_adapter(tmp_path / "again", adapter, pretrained_checkpoint="b")
    assert written == "CanonicalLoRA"
    again = open_megatron_adapter(tmp_path / "again", config=config)
    assert_same_factors(again, adapter)


def test_write_megatron_adapter_gives_back_the_tensors_and_says_what_loads_them(
    tmp_path: Path, config: DecoderConfig
) -> None:
    tensors = fused_tensors()
    adapter = open_megatron_adapter(save(tmp_path / "x", tensors, config), config=config)
    (tmp_path / "again").mkdir()
    kind = write_megatron_adapter(
        tmp_path / "again", adapter, pretrained_checkpoint="bases/mine", iteration=7
    )
    assert kind == "LoRA"
    directory = tmp_path / "again" / "iter_0000007"
    reader = TorchDistReader(directory)
    assert set(reader.names) == set(tensors)
    assert all(torch.equal(reader.read(name), tensors[name]) for name in tensors)
    run_config = yaml.safe_load((directory / "run_config.yaml").read_text(encoding="utf-8"))
    assert run_config["checkpoint"]["pretrained_checkpoint"] == "bases/mine"
    peft = run_config["peft"]
    assert (peft["dim"], peft["alpha"], peft["target_modules"]) == (RANK, ALPHA, TARGETS)
    state = torch.load(tmp_path / "again" / "latest_train_state.pt", weights_only=True)
    assert state["step"] == 7


@pytest.mark.parametrize("change", ["rank", "layer"])
def test_write_megatron_adapter_refuses_what_its_format_does_not_express(
    tmp_path: Path, config: DecoderConfig, change: str
) -> None:
    ranks = {0: 2, 1: 3} if change == "rank" else {0: 3}
    save_peft_adapter(tmp_path / "peft", config, ranks=ranks)
    adapter = open_adapter(tmp_path / "peft", config=config)
    wanted = "differ in rank or scale" if change == "rank" else "only in some layers"
    with pytest.raises(NemotronError, match=wanted) as caught:
        write_megatron_adapter(tmp_path, adapter, pretrained_checkpoint="b")
    assert caught.value.code == "adapter_config"
    assert "convert/merge_lora" in caught.value.fix


PROJ = "decoder.layers.self_attention.linear_proj.adapter"


@pytest.mark.parametrize(
    ("code", "change", "message"),
    [
        ("half_missing", {f"{PROJ}.linear_out.weight": None}, "has only linear_in"),
        (
            "keys_unexpected",
            {f"{PROJ}.extra.weight": torch.zeros(1)},
            "extra.weight is not a tensor",
        ),
        (
            "keys_unexpected",
            {"output_layer.weight": torch.zeros(1)},
            "output_layer.weight is not a",
        ),
        ("shape", {f"{PROJ}.linear_in.weight": torch.zeros(2, 3, 15)}, "require [2, 3, 16]"),
        ("shape", {f"{PROJ}.linear_in.weight": torch.zeros(3, 3, 16)}, "has shape [3, 3, 16]"),
        ("rank", {f"{PROJ}.linear_in.weight": torch.zeros(2, 4, 16)}, "rank 4; peft.dim is 3"),
        ("not_finite", {f"{PROJ}.linear_out.weight": torch.full((2, 16, 3), torch.inf)}, "not fin"),
    ],
)
def test_open_refuses_tensors_that_are_not_the_adapters(
    tmp_path: Path,
    config: DecoderConfig,
    code: str,
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    tensors = {k: v for k, v in {**fused_tensors(), **change}.items() if v is not None}
    error = refused(save(tmp_path / "x", tensors, config), config)
    assert error.code == f"adapter_{code}"
    assert message in error.problem


@pytest.mark.parametrize(
    ("code", "change", "message"),
    [
        ("config", {"_target_": "megatron.bridge.peft.dora.DoRA"}, "peft is 'DoRA'; wanted LoRA"),
        ("config", {"dim": None}, "peft.dim is None"),
        ("config", {"alpha": "8"}, "peft.alpha is '8'"),
        ("keys_unexpected", {"target_modules": TARGETS[:3]}, "down_proj has tensors"),
        ("rank", {"dim": 4}, "rank 3; peft.dim is 4"),
    ],
)
def test_open_refuses_a_run_config_that_contradicts_the_tensors(
    tmp_path: Path, config: DecoderConfig, code: str, change: dict[str, Any], message: str
) -> None:
    error = refused(save(tmp_path / "x", fused_tensors(), config, **change), config)
    assert error.code == f"adapter_{code}"
    assert message in error.problem


def test_open_names_a_target_without_tensors(tmp_path: Path, config: DecoderConfig) -> None:
    tensors = {k: v for k, v in fused_tensors().items() if "linear_fc2" not in k}
    error = refused(save(tmp_path / "x", tensors, config), config)
    assert error.code == "adapter_keys_missing"
    assert "adapted modules without tensors: 2, first model.layers.0.mlp.down_proj" in error.problem
