"""The FLOPs of a step against what torch counts while the model takes one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.flops import lora_flops

CONFIG = DecoderConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=4,
    vocab_size=97,
    layernorm_epsilon=1e-5,
    rotary_base=1e4,
    rope_scaling=None,
    share_embeddings_and_output_weights=False,
    max_position_embeddings=128,
)
CU_SEQLENS = (0, 20, 50)


ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@pytest.mark.parametrize(
    "lora",
    [
        LoraTargets(ALL, LoraSpec(8, 8.0)),
        LoraTargets(ALL, LoraSpec(8, 8.0), rank_pattern={"linear_fc1": 16}),
        LoraTargets(["linear_proj"], LoraSpec(8, 8.0)),  # no backward through the first linear_qkv
        LoraTargets(["*.layers.1.mlp.linear_fc1"], LoraSpec(8, 8.0)),
    ],
)
def test_the_flops_of_a_step_are_those_of_the_matrix_products_it_takes(lora: LoraTargets) -> None:
    supervised = 17
    flops = replace(lora_flops(CONFIG, lora), per_pair=0.0)  # torch counts no attention on a CPU
    assert flops.of(CU_SEQLENS, supervised) == matrix_products(lora, supervised)


def test_attention_counts_the_pairs_within_documents_forward_and_twice_backward() -> None:
    seen = sum(
        int(torch.ones(stop - start, stop - start).tril().sum())
        for start, stop in pairwise(CU_SEQLENS)
    )
    # Per pair and head: a score and a share of the value, each of 4 channels, 2 operations each.
    forward = seen * 8 * (4 + 4) * 2
    for target, num_backward in (("linear_qkv", 3), ("linear_proj", 2), ("*.layers.2.mlp.*", 0)):
        flops = lora_flops(CONFIG, LoraTargets([target], LoraSpec(8, 8.0)))
        total = replace(flops, per_token=0.0, per_supervised=0.0).of(CU_SEQLENS, 1)
        assert total == 3 * forward + num_backward * 2 * forward


def test_a_micro_batch_that_trains_nothing_costs_nothing() -> None:
    assert lora_flops(CONFIG, LoraTargets(ALL, LoraSpec(8, 8.0))).of(CU_SEQLENS, 0) == 0.0


def matrix_products(lora: LoraTargets, num_supervised: int) -> int:
    """Return the FLOPs of all matrix products of one real step, as torch counts them."""
    model = GPTModel(CONFIG, lora=lora, group=ProcessGroup(), dtype=torch.float32)
    for buffer in model.buffers():
        torch.nn.init.zeros_(buffer)
    tokens = torch.zeros(CU_SEQLENS[-1], dtype=torch.int64)
    labels = torch.zeros(num_supervised, dtype=torch.int64)
    in_place = {torch.ops.aten.addmm_: addmm_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model(tokens, CU_SEQLENS)
        model.loss(hidden[:num_supervised], labels).sum().backward()
    return counter.get_total_flops()


def addmm_flops(_: Any, first: Any, second: Any, **__: Any) -> int:
    return 2 * first[0] * first[1] * second[1]
