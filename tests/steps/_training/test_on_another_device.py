"""A step on a device that holds no values: it waits for none, and mixes no devices.

``meta`` is to the host what a GPU is, but that it computes nothing: a tensor made in the wrong
place, or a number that the host asks for in the middle of a step, is an error here. Collectives go
through torch's fake process group, which stands for NCCL's: they return at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron.steps._models.attention import PackedDocuments, flash_on_gpu, rotary_tables
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._models.layouts import LORA_TARGETS
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.batches import MicroBatch
from nemotron.steps._training.distributed import Layout, make_layout
from nemotron.steps._training.flat_adapter import FlatAdapter
from nemotron.steps._training.pipeline import PipelineStage, WeightedBatch

META = torch.device("meta")
LLAMA = DecoderConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=50,
    layernorm_epsilon=1e-5,
    rotary_base=10000.0,
    rope_scaling=None,
    share_embeddings_and_output_weights=False,
    max_position_embeddings=64,
)


class AwaitedCopies(TorchDispatchMode):
    """Lists the copies to another device that the host waits for, and so for all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            leaves = kwargs.get("device") not in (None, args[0].device)
            self.shapes += [args[0].shape] if leaves else []
        return function(*args, **kwargs)


@pytest.fixture
def layout() -> Iterator[Layout]:
    if torch.__version__ < "2.11":
        pytest.skip("collectives of tensors without values need torch 2.11")
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield make_layout(tensor_size=2, stage_size=4, device=META)
    dist.destroy_process_group()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("is_qwen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_asks_its_device_for_nothing_and_leaves_its_gradients_there(
    layout: Layout, sequence_parallel: bool, is_qwen: bool, dtype: torch.dtype
) -> None:
    config = replace(LLAMA, add_qkv_bias=is_qwen, qk_layernorm=is_qwen)
    lora = LoraTargets(tuple(LORA_TARGETS), LoraSpec(4, 8.0))
    with META:
        model = GPTModel(
            config,
            lora=lora,
            group=layout.tensor,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            recompute=is_qwen,
        )
        micro = MicroBatch(
            tokens=torch.zeros(21, dtype=torch.int64),
            labels=torch.zeros(5, dtype=torch.int64),
            supervised=torch.zeros(5, dtype=torch.int64),
            cu_seqlens=(0, 8, 21),
            row_tokens=(21,),
        )
    stage = PipelineStage([model], group=layout.pipeline, device=META)
    factors = [each for linear in stage.adapted_linears() for each in linear.lora_parameters()]
    adapter = FlatAdapter(factors, layout)
    loss = stage.train([WeightedBatch(micro), WeightedBatch(micro)])
    adapter.reduce_gradients()
    torch.optim.AdamW([adapter.values]).step()
    assert loss.device == META
    assert adapter.gradients.device == META
    assert [each.name for each in factors if each.parameter.grad is None] == []


def test_a_micro_batch_goes_to_its_device_while_that_is_busy_with_the_last_one() -> None:
    ids = torch.zeros(21, dtype=torch.int64)
    micro = MicroBatch(ids, ids[:5], ids[:5], cu_seqlens=(0, 8, 21), row_tokens=(21,))
    with AwaitedCopies() as awaited:
        there = micro.to(META)
        rotary = rotary_tables(LLAMA, micro.cu_seqlens, dtype=torch.bfloat16, device=META)
        documents = PackedDocuments(micro.cu_seqlens, rotary)
        tensors = [there.tokens, there.labels, there.supervised, documents.bounds, *rotary]
    assert {tensor.device for tensor in tensors} == {META}
    assert awaited.shapes == []


def test_the_attention_of_a_gpu_takes_packed_rows_with_grouped_heads_and_gives_gradients() -> None:
    shapes = [(21, 4, 8), (21, 2, 8), (21, 2, 8)]
    query, key, value = (
        torch.empty(shape, dtype=torch.bfloat16, device=META, requires_grad=True)
        for shape in shapes
    )
    rotary = torch.empty(0, device=META), torch.empty(0, device=META)
    out = flash_on_gpu(query, key, value, PackedDocuments((0, 8, 21), rotary))
    assert (tuple(out.shape), out.dtype) == (shapes[0], torch.bfloat16)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert [tuple(each.shape) for each in gradients] == shapes
