"""Floors under a case's optimizer step, from GEMMs and attention of the same shapes alone.

``gemms``: the frozen base's forward and dgrad, and those of the output layer on supervised tokens.
``work``: those, attention within each document, and the adapters' GEMMs. ``sent``: those, and the
all-reduces that tensor parallelism cannot do without. Nothing else is computed: no norm,
activation, rotation, residual, softmax or optimizer. Every rank computes its share.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import LORA_TARGETS, weight_rules
from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_reduce

Work = Callable[[], object]


def floor_steps(
    config: DecoderConfig, case: dict[str, Any], group: ProcessGroup
) -> dict[str, Callable[[], float]]:
    """Return what computes each floor once, for a rank of a tensor-parallel group."""
    micro_batches = case["micro_batches"]
    base = [_base(config, each, group.size) for each in micro_batches]
    rest = [_rest(config, each, case["dim"], group.size) for each in micro_batches]
    sent = [_sent(config, each, group) for each in micro_batches]
    floors = {"gemms": base, "work": [*base, *rest], "sent": [*base, *rest, *sent]}
    return {name: _step(works) for name, works in floors.items()}


def _step(works: list[list[Work]]) -> Callable[[], float]:
    def step() -> float:
        for work in works:
            for each in work:
                each()
        return 0.0

    return step


def _base(config: DecoderConfig, micro: dict[str, Any], size: int) -> list[Work]:
    """Forward and dgrad of every base linear; the first layer's qkv has no dgrad."""
    tokens = len(micro["tokens"])
    supervised = sum(label >= 0 for label in micro["labels"])
    works: list[Work] = []
    for layer in range(config.num_layers):
        for target, (out_features, in_features) in _linears(config, size).items():
            x, w = torch.randn(tokens, in_features), torch.randn(out_features, in_features)
            dy = torch.randn(tokens, out_features)
            works.append(lambda x=x, w=w: x @ w.T)
            if layer or target != "linear_qkv":
                works.append(lambda dy=dy, w=w: dy @ w)
    x, w = (
        torch.randn(supervised, config.hidden_size),
        torch.randn(config.vocab_size // size, config.hidden_size),
    )
    dy = torch.randn(supervised, len(w))
    return [*works, lambda: x @ w.T, lambda: dy @ w]


def _rest(config: DecoderConfig, micro: dict[str, Any], dim: int, size: int) -> list[Work]:
    """Attention and its gradient, and an adapter's six GEMMs per linear (five without dx)."""
    tokens = len(micro["tokens"])
    works: list[Work] = []
    for layer in range(config.num_layers):
        works += _attention(config, micro["cu_seqlens"], size)
        for target, (out_features, in_features) in _linears(config, size).items():
            x, dy = torch.randn(tokens, in_features), torch.randn(tokens, out_features)
            a, b = torch.randn(dim, in_features), torch.randn(out_features, dim)
            h = torch.randn(tokens, dim)
            works += [
                lambda x=x, a=a: x @ a.T,
                lambda h=h, b=b: h @ b.T,
                lambda dy=dy, b=b: dy @ b,
                lambda dy=dy, h=h: h.T @ dy,
                lambda h=h, x=x: h.T @ x,
            ]
            if layer or target != "linear_qkv":
                works.append(lambda h=h, a=a: h @ a)
    return works


def _sent(config: DecoderConfig, micro: dict[str, Any], group: ProcessGroup) -> list[Work]:
    """Four all-reduces of the residual's size a layer, two each way, three without dx; two ends."""
    x = torch.zeros(len(micro["tokens"]), config.hidden_size)
    return [lambda: all_reduce(x, group)] * (4 * config.num_layers - 1 + 2)


def _attention(config: DecoderConfig, cu_seqlens: list[int], size: int) -> list[Work]:
    heads = config.num_attention_heads // size, config.num_query_groups // size
    works: list[Work] = []
    for start, stop in pairwise(cu_seqlens):
        query, key, value = (
            torch.randn(1, count, stop - start, config.kv_channels, requires_grad=True)
            for count in (heads[0], heads[1], heads[1])
        )
        dout = torch.randn_like(query)
        works.append(lambda q=query, k=key, v=value, d=dout: _attend(q, k, v, d))
    return works


def _attend(query: Tensor, key: Tensor, value: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(out, (query, key, value), dout)


def _linears(config: DecoderConfig, size: int) -> dict[str, tuple[int, int]]:
    """Return the shape of each linear's shard, [out features, in features]."""
    shapes = {}
    for rule in weight_rules(config):
        target = rule.megatron.removesuffix(".weight").rpartition(".")[2]
        if target in LORA_TARGETS:
            out_features, in_features = rule.shape
            is_column = target in ("linear_qkv", "linear_fc1")
            shape = out_features // size, in_features
            shapes[target] = shape if is_column else (out_features, in_features // size)
    return shapes
