"""Layouts against transformers' own names and shapes, and against products of whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.errors import NemotronError
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import (
    LORA_TARGETS,
    fuse_qkv,
    hf_tensors,
    join_rows,
    lora_from_hf,
    lora_hf_modules,
    lora_to_hf,
    part_rows,
    split_qkv,
    split_rows,
    weight_rules,
)


def _config(*, is_tied: bool = False, num_query_groups: int = 2) -> DecoderConfig:
    return DecoderConfig(
        num_layers=2,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=4,
        num_query_groups=num_query_groups,
        kv_channels=2,
        vocab_size=11,
        layernorm_epsilon=1e-5,
        rotary_base=1e4,
        rope_scaling=None,
        share_embeddings_and_output_weights=is_tied,
        max_position_embeddings=16,
    )


def _factors(config: DecoderConfig, lora_rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random whole factors for every linear layer of every layer."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        rule.megatron.removesuffix(".weight"): rule.shape
        for rule in weight_rules(config)
        if rule.megatron.removesuffix(".weight").rsplit(".", 1)[-1] in LORA_TARGETS
    }
    return {
        name.replace("decoder.layers.", f"decoder.layers.{layer}."): (
            torch.randn(lora_rank, shape[1], generator=generator),
            torch.randn(shape[0], lora_rank, generator=generator),
        )
        for layer in range(config.num_layers)
        for name, shape in shapes.items()
    }


def test_fuse_qkv_orders_rows_by_kv_group() -> None:
    q, k, v = (
        torch.arange(8)[:, None],
        100 + torch.arange(4)[:, None],
        200 + torch.arange(4)[:, None],
    )
    fused = fuse_qkv(q, k, v, config=_config())
    # 2 groups of 2 query heads, 1 key head, 1 value head, each 2 rows.
    assert fused[:, 0].tolist() == [
        *(0, 1, 2, 3, 100, 101, 200, 201),
        *(4, 5, 6, 7, 102, 103, 202, 203),
    ]


@pytest.mark.parametrize("num_query_groups", [1, 2, 4])
@pytest.mark.parametrize("trailing", [(), (12,), (3,)])
def test_split_qkv_undoes_fuse_qkv(num_query_groups: int, trailing: tuple[int, ...]) -> None:
    config = _config(num_query_groups=num_query_groups)
    generator = torch.Generator().manual_seed(0)
    rows = (8, 2 * num_query_groups, 2 * num_query_groups)
    parts = [torch.randn(count, *trailing, generator=generator) for count in rows]
    again = split_qkv(fuse_qkv(*parts, config=config), config=config)
    for part, other in zip(parts, again, strict=True):
        assert torch.equal(part, other)
        assert other.is_contiguous()


@pytest.mark.parametrize("num_query_groups", [1, 2, 4])
def test_part_rows_are_the_rows_that_split_rows_returns(num_query_groups: int) -> None:
    config = _config(num_query_groups=num_query_groups)
    for tensor in hf_tensors(config).values():
        fused = torch.arange(tensor.rule.shape[0])
        wanted = split_rows(fused, layout=tensor.rule.layout, config=config)[tensor.part]
        rows = [fused[each] for each in part_rows(tensor, config)]
        assert torch.equal(torch.cat(rows), wanted)


def test_join_rows_puts_all_gate_rows_before_all_up_rows() -> None:
    gate, up = torch.zeros(10, 12), torch.ones(10, 12)
    joined = join_rows([gate, up], layout="gate_up", config=_config())
    assert joined[:, 0].tolist() == [0.0] * 10 + [1.0] * 10
    again = split_rows(joined, layout="gate_up", config=_config())
    assert torch.equal(again[0], gate)
    assert torch.equal(again[1], up)


@pytest.mark.parametrize("is_tied", [False, True])
def test_hf_tensors_are_those_of_transformers(is_tied: bool) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=12,
            intermediate_size=10,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=2,
            tie_word_embeddings=is_tied,
        )
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    tensors = hf_tensors(_config(is_tied=is_tied))
    assert {name: tensor.shape for name, tensor in tensors.items()} == wanted
    layers = [tensor.layer for tensor in tensors.values()]
    assert layers == [None, *[0] * 9, *[1] * 9, *[None] * (1 if is_tied else 2)]


def test_lora_to_hf_gives_each_part_its_rows_of_the_delta() -> None:
    config = _config()
    for name, (lora_a, lora_b) in _factors(config).items():
        hf = lora_to_hf(name, lora_a, lora_b, config)
        deltas = [
            hf[f"base_model.model.{module}.lora_B.weight"]
            @ hf[f"base_model.model.{module}.lora_A.weight"]
            for module in lora_hf_modules(name)
        ]
        layouts = {"linear_qkv": "qkv", "linear_fc1": "gate_up"}
        layout = layouts.get(name.rsplit(".", 1)[-1], "same")
        fused = join_rows(deltas, layout=layout, config=config)  # type: ignore[arg-type]
        # fp32 products over R = 3 of unit-variance factors: rounding of 3 terms.
        torch.testing.assert_close(fused, lora_b @ lora_a, rtol=0, atol=2e-6)


def test_lora_from_hf_undoes_lora_to_hf() -> None:
    config = _config()
    factors = _factors(config)
    tensors: dict[str, Tensor] = {}
    for name, (lora_a, lora_b) in factors.items():
        tensors |= lora_to_hf(name, lora_a, lora_b, config)
    again = lora_from_hf(tensors, config)
    assert again.keys() == factors.keys()
    for name, pair in factors.items():
        assert torch.equal(again[name][0], pair[0])
        assert torch.equal(again[name][1], pair[1])


@pytest.mark.parametrize("kind", ["other lora_A", "part missing"])
def test_lora_from_hf_refuses_parts_that_were_not_trained_fused(kind: str) -> None:
    config = _config()
    name = "decoder.layers.1.self_attention.linear_qkv"
    tensors = lora_to_hf(name, *_factors(config)[name], config)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    if kind == "other lora_A":
        tensors[key] = tensors[key] + 1
    else:
        del tensors[key]
    with pytest.raises(NemotronError, match="do not share one lora_A") as caught:
        lora_from_hf(tensors, config)
    assert caught.value.code == "adapter_not_fused"


@pytest.mark.parametrize(
    "name", ["decoder.layers.1.self_attention.linear_fc1", "decoder.layers.1.mlp", "output_layer"]
)
def test_lora_hf_modules_refuses_what_is_no_linear_layer(name: str) -> None:
    with pytest.raises(ValueError, match="is not a linear layer of the decoder"):
        lora_hf_modules(name)
