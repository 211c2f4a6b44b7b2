"""Translates names and layouts of weights and LoRA factors between Hugging Face and Megatron.

Megatron fuses q, k and v into ``linear_qkv`` (rows ordered by KV group: the group's query heads,
then its key head, then its value head) and gate and up into ``linear_fc1`` (all gate rows, then all
up rows). Everything else is only renamed. All functions here move rows and never compute, so a
round trip gives the same bits.

On disk Megatron stacks the layers, so its names carry no layer number
(``decoder.layers.self_attention.linear_qkv.weight``); LoRA modules are named with their layer, as
in the model (``decoder.layers.3.self_attention.linear_qkv``).

Source: Megatron-Bridge, param_mapping.py and peft_bridge.py (names and layouts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._models.config import DecoderConfig

Layout = Literal["same", "qkv", "gate_up"]

# LoRA targets: the last part of a Megatron module name -> the last parts of the PEFT names.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_PARENTS = {
    "linear_qkv": ("self_attention", "self_attn"),
    "linear_proj": ("self_attention", "self_attn"),
    "linear_fc1": ("mlp", "mlp"),
    "linear_fc2": ("mlp", "mlp"),
}
_LAYOUTS: dict[str, Layout] = {"linear_qkv": "qkv", "linear_fc1": "gate_up"}
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class WeightRule:
    """One Megatron tensor and the Hugging Face tensors whose rows it holds.

    Args:
        megatron: Name on disk, without a layer number.
        hf: Hugging Face names, in the order of the rows; ``{layer}`` stands for the layer number.
        layout: How the rows of ``hf`` lie in the Megatron tensor.
        shape: Shape of the Megatron tensor, of one layer where ``is_layered``.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]

    @property
    def is_layered(self) -> bool:
        """Whether every layer has one, stacked along a leading dimension on disk."""
        return self.megatron.startswith("decoder.layers.")


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor: its rule, its layer (None outside of layers) and its part."""

    name: str
    shape: tuple[int, ...]
    rule: WeightRule
    layer: int | None
    part: int


def weight_rules(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Return the rule of every weight of a model, in the order of the model."""
    h, f, v = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    heads_dim = config.num_attention_heads * config.kv_channels
    layer, on_disk = "model.layers.{layer}.", "decoder.layers."
    return (
        WeightRule(
            "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "same", (v, h)
        ),
        WeightRule(
            f"{on_disk}self_attention.linear_qkv.layer_norm_weight",
            (f"{layer}input_layernorm.weight",),
            "same",
            (h,),
        ),
        _linear_rule("linear_qkv", (_qkv_rows(config), h)),
        *_attention_extras(config),
        _linear_rule("linear_proj", (h, heads_dim)),
        WeightRule(
            f"{on_disk}mlp.linear_fc1.layer_norm_weight",
            (f"{layer}post_attention_layernorm.weight",),
            "same",
            (h,),
        ),
        _linear_rule("linear_fc1", (2 * f, h)),
        _linear_rule("linear_fc2", (h, f)),
        WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "same", (h,)),
        *(
            ()
            if config.share_embeddings_and_output_weights
            else (WeightRule("output_layer.weight", ("lm_head.weight",), "same", (v, h)),)
        ),
    )


def hf_tensors(config: DecoderConfig) -> dict[str, HfTensor]:
    """Return every Hugging Face tensor of a model by name, in the order of the model.

    A tied ``lm_head.weight`` is not among them.
    """
    rules = weight_rules(config)
    layered = [rule for rule in rules if rule.is_layered]
    first, last = rules[:1], [rule for rule in rules[1:] if not rule.is_layered]
    places: list[tuple[WeightRule, int | None]] = [(rule, None) for rule in first]
    places += [(rule, layer) for layer in range(config.num_layers) for rule in layered]
    places += [(rule, None) for rule in last]
    tensors = [
        HfTensor(name.format(layer=layer), shape, rule, layer, part)
        for rule, layer in places
        for part, (name, shape) in enumerate(zip(rule.hf, _part_shapes(rule, config), strict=True))
    ]
    return {tensor.name: tensor for tensor in tensors}


def join_rows(parts: Sequence[Tensor], *, layout: Layout, config: DecoderConfig) -> Tensor:
    """Return the Megatron tensor that holds the rows of Hugging Face ``parts`` in ``layout``."""
    if layout == "qkv":
        q, k, v = parts
        return fuse_qkv(q, k, v, config=config)
    return torch.cat(tuple(parts)) if layout == "gate_up" else parts[0]


def split_rows(tensor: Tensor, *, layout: Layout, config: DecoderConfig) -> tuple[Tensor, ...]:
    """Return the Hugging Face parts of a Megatron tensor; inverse of ``join_rows``."""
    if layout == "qkv":
        return split_qkv(tensor, config=config)
    return tuple(tensor.chunk(2)) if layout == "gate_up" else (tensor,)


def row_runs(rule: WeightRule, config: DecoderConfig) -> list[tuple[int, int]]:
    """Return the order of a Megatron tensor's rows as runs: (index of the part, number of rows)."""
    if rule.layout == "qkv":
        d = config.kv_channels
        heads_per_group = config.num_attention_heads // config.num_query_groups
        return [(0, heads_per_group * d), (1, d), (2, d)] * config.num_query_groups
    num_rows = rule.shape[0] // len(rule.hf)
    return [(part, num_rows) for part in range(len(rule.hf))]


def part_rows(tensor: HfTensor, config: DecoderConfig) -> list[slice]:
    """Return the rows of the Megatron tensor that make up a Hugging Face tensor, in order."""
    runs = row_runs(tensor.rule, config)
    stops = accumulate(num_rows for _, num_rows in runs)
    return [
        slice(stop - num_rows, stop)
        for (part, num_rows), stop in zip(runs, stops, strict=True)
        if part == tensor.part
    ]


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, *, config: DecoderConfig) -> Tensor:
    """Return q, k and v as one tensor whose rows are grouped by KV head.

    Args:
        q: [num_attention_heads * kv_channels, ...].
        k: [num_query_groups * kv_channels, ...].
        v: As ``k``.
        config: Sizes of the model.

    Returns:
        [(num_attention_heads + 2 * num_query_groups) * kv_channels, ...], contiguous.
    """
    groups, d = config.num_query_groups, config.kv_channels
    grouped = [part.reshape(groups, -1, d, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, *q.shape[1:])


def split_qkv(qkv: Tensor, *, config: DecoderConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the contiguous q, k and v of a fused tensor; inverse of ``fuse_qkv``."""
    groups, d = config.num_query_groups, config.kv_channels
    heads_per_group = config.num_attention_heads // groups
    grouped = qkv.reshape(groups, heads_per_group + 2, d, *qkv.shape[1:])
    q, k, v = grouped.split([heads_per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *qkv.shape[1:]).contiguous() for part in (q, k, v))  # type: ignore[return-value]


def lora_to_hf(
    name: str, lora_a: Tensor, lora_b: Tensor, config: DecoderConfig
) -> dict[str, Tensor]:
    """Return the PEFT tensors of one Megatron module's LoRA factors.

    A fused module becomes one PEFT module per part. They share ``lora_a``, which is the same tensor
    for all; ``lora_b`` is split by rows as the weight is.

    Args:
        name: Megatron module, such as ``decoder.layers.3.self_attention.linear_qkv``.
        lora_a: [R, in features].
        lora_b: [out features, R], whole (not a tensor-parallel shard).
        config: Sizes of the model.
    """
    tensors = {}
    parts = split_lora_rows(name, lora_b, config=config)
    for module, part in zip(lora_hf_modules(name), parts, strict=True):
        tensors[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = lora_a
        tensors[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = part.contiguous()
    return tensors


def lora_from_hf(
    tensors: Mapping[str, Tensor], config: DecoderConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the LoRA factors (lora_a, lora_b) by Megatron module; inverse of ``lora_to_hf``.

    Raises:
        NemotronError: ``adapter_not_fused``: the parts of a fused module are not all there or do
            not share one ``lora_a``, so no single pair of factors stands for them.
    """
    factors = {}
    for layer in range(config.num_layers):
        for target, (megatron_parent, _) in _PARENTS.items():
            name = f"decoder.layers.{layer}.{megatron_parent}.{target}"
            keys = [f"{_PEFT_PREFIX}{module}.lora_" for module in lora_hf_modules(name)]
            present = [key for key in keys if f"{key}A.weight" in tensors]
            if not present:
                continue
            lora_a = tensors[f"{present[0]}A.weight"]
            is_shared = all(torch.equal(lora_a, tensors[f"{key}A.weight"]) for key in present)
            if present != keys or not is_shared:
                raise _not_fused(name, keys)
            lora_b = [tensors[f"{key}B.weight"] for key in keys]
            factors[name] = (lora_a, join_lora_rows(name, lora_b, config=config))
    return factors


def join_lora_rows(name: str, parts: Sequence[Tensor], *, config: DecoderConfig) -> Tensor:
    """Return lora_b of a Megatron module from those of its parts, in the order of the modules."""
    return join_rows(parts, layout=_LAYOUTS.get(_target(name), "same"), config=config)


def split_lora_rows(name: str, lora_b: Tensor, *, config: DecoderConfig) -> tuple[Tensor, ...]:
    """Return lora_b of each part of a Megatron module; inverse of ``join_lora_rows``."""
    return split_rows(lora_b, layout=_LAYOUTS.get(_target(name), "same"), config=config)


def lora_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return [out features, in features] of every module that an adapter may be on, by HF name."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in hf_tensors(config).items()
        if tensor.layer is not None and len(tensor.shape) == 2
    }


def lora_hf_modules(name: str) -> tuple[str, ...]:
    """Return the Hugging Face modules that a Megatron module stands for.

    ``decoder.layers.3.mlp.linear_fc1`` gives ``model.layers.3.mlp.gate_proj`` and the same with
    ``up_proj``.

    Raises:
        ValueError: ``name`` is not a linear layer of the decoder.
    """
    target = _target(name)
    parts = name.split(".")
    if target not in LORA_TARGETS or len(parts) != 5 or parts[3] != _PARENTS[target][0]:
        raise ValueError(f"{name!r} is not a linear layer of the decoder")
    parent = _PARENTS[target][1]
    return tuple(f"model.layers.{parts[2]}.{parent}.{leaf}" for leaf in LORA_TARGETS[target])


def _target(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _linear_rule(target: str, shape: tuple[int, int]) -> WeightRule:
    megatron_parent, hf_parent = _PARENTS[target]
    hf = tuple(f"model.layers.{{layer}}.{hf_parent}.{leaf}.weight" for leaf in LORA_TARGETS[target])
    name = f"decoder.layers.{megatron_parent}.{target}.weight"
    return WeightRule(name, hf, _LAYOUTS.get(target, "same"), shape)


def _attention_extras(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Return the rules of what only some families have: Qwen2's bias, Qwen3's norms."""
    attention, hf = "decoder.layers.self_attention", "model.layers.{layer}.self_attn"
    rules: list[WeightRule] = []
    if config.add_qkv_bias:
        names = tuple(f"{hf}.{leaf}.bias" for leaf in LORA_TARGETS["linear_qkv"])
        shape = (_qkv_rows(config),)
        rules.append(WeightRule(f"{attention}.linear_qkv.bias", names, "qkv", shape))
    if config.qk_layernorm:
        rules += [
            WeightRule(
                f"{attention}.{head}_layernorm.weight",
                (f"{hf}.{head}_norm.weight",),
                "same",
                (config.kv_channels,),
            )
            for head in ("q", "k")
        ]
    return tuple(rules)


def _qkv_rows(config: DecoderConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels


def _part_shapes(rule: WeightRule, config: DecoderConfig) -> list[tuple[int, ...]]:
    rest = rule.shape[1:]
    if rule.layout == "qkv":
        heads = (config.num_attention_heads, config.num_query_groups, config.num_query_groups)
        return [(count * config.kv_channels, *rest) for count in heads]
    if rule.layout == "gate_up":
        return [(config.ffn_hidden_size, *rest)] * 2
    return [rule.shape]


def _not_fused(name: str, keys: Sequence[str]) -> NemotronError:
    return NemotronError(
        "adapter_not_fused",
        f"{name}: {', '.join(keys)} do not share one lora_A",
        why="the adapter was not trained on the fused layer",
        fix="merge it into its base: convert/merge_lora accepts it as it is",
        exit_code=ExitCode.DATA,
    )
