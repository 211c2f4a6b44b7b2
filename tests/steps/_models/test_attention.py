"""Heads and attention of packed rows against plain autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron.steps._models.attention import (
    HeadNorms,
    PackedDocuments,
    attention_by_document,
    flash_takes,
    packed_attention,
    rotary_tables,
    rotated_heads,
)
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._tensor_parallel.prologue import RMSNormPrologue

CU_SEQLENS = (0, 5, 6, 14)
TOKENS, GROUPS, QUERIES, SIZE = 14, 2, 3, 8
EPSILON = 1e-5


class Operations(TorchDispatchMode):
    """Counts what torch is called to do."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def config() -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_size": GROUPS * QUERIES * SIZE,
            "intermediate_size": 8,
            "num_attention_heads": GROUPS * QUERIES,
            "num_key_value_heads": GROUPS,
            "vocab_size": 8,
            "rms_norm_eps": EPSILON,
            "max_position_embeddings": 64,
            "hidden_act": "silu",
        }
    )


@pytest.fixture
def rotary(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    return rotary_tables(config, CU_SEQLENS, dtype=torch.float64, device=torch.device("cpu"))


def plainly(heads: Tensor, rotary: tuple[Tensor, Tensor], weight: Tensor | None) -> Tensor:
    """Return heads [S, heads, D], normed and rotated as the papers write it."""
    if weight is not None:
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPSILON) * weight
    a, b = heads.chunk(2, dim=-1)
    cos, sin = (table.squeeze(1) for table in rotary)
    return heads * cos + torch.cat([-b * sin, a * sin], dim=-1)


@pytest.mark.parametrize("is_normed", [False, True])
def test_rotated_heads_and_their_gradient_are_those_of_plain_autograd(
    rotary: tuple[Tensor, Tensor], is_normed: bool
) -> None:
    weights = [random(SIZE, seed=each) if is_normed else None for each in (1, 2)]
    norms = None
    if is_normed:
        norms = HeadNorms(*(RMSNormPrologue(each, EPSILON) for each in weights if each is not None))
    qkv = random(TOKENS, GROUPS, QUERIES + 2, SIZE, seed=3).requires_grad_()
    got = rotated_heads(qkv, rotary, norms)
    query, key, value = qkv.split([QUERIES, 1, 1], dim=2)
    wanted = [
        plainly(query.flatten(1, 2), rotary, weights[0]),
        plainly(key.squeeze(2), rotary, weights[1]),
        value.squeeze(2),
    ]
    gradients = [random(*each.shape, seed=4) for each in wanted]
    for have, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(have, want)
    (got_gradient,) = torch.autograd.grad(got, qkv, gradients)
    (wanted_gradient,) = torch.autograd.grad(wanted, qkv, gradients)
    torch.testing.assert_close(got_gradient, wanted_gradient)


def test_positions_restart_at_every_document(rotary: tuple[Tensor, Tensor]) -> None:
    for table in rotary:
        torch.testing.assert_close(table[5], table[0])
        torch.testing.assert_close(table[6:11], table[:5])


def test_many_documents_take_as_many_operations_as_two(config: DecoderConfig) -> None:
    # On a GPU each is a kernel to launch, for every micro batch.
    def count(cu_seqlens: tuple[int, ...]) -> int:
        with Operations() as seen:
            rotary_tables(config, cu_seqlens, dtype=torch.bfloat16, device=torch.device("cpu"))
        return seen.count

    assert count(tuple(range(0, 8193, 64))) == count((0, 64, 8192))


def test_what_all_layers_share_is_computed_once(rotary: tuple[Tensor, Tensor]) -> None:
    documents = PackedDocuments(CU_SEQLENS, rotary)
    assert documents.longest == 8
    assert documents.bounds.tolist() == list(CU_SEQLENS)
    assert documents.bounds is documents.bounds


@pytest.mark.parametrize("attention", [packed_attention, attention_by_document])
def test_documents_do_not_attend_to_each_other_and_gradients_are_exact(
    rotary: tuple[Tensor, Tensor], attention: Callable[..., Tensor]
) -> None:
    query = random(TOKENS, GROUPS * QUERIES, SIZE, seed=5).requires_grad_()
    key, value = (random(TOKENS, GROUPS, SIZE, seed=each).requires_grad_() for each in (6, 7))
    position = torch.arange(TOKENS)
    document = torch.bucketize(position, torch.tensor(CU_SEQLENS[1:]), right=True)
    visible = (document[:, None] == document) & (position[:, None] >= position)
    wide_key, wide_value = (each.repeat_interleave(QUERIES, dim=1) for each in (key, value))
    scores = torch.einsum("snd,tnd->nst", query, wide_key) / SIZE**0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    wanted = torch.einsum("nst,tnd->snd", weights, wide_value)
    got = attention(query, key, value, PackedDocuments(CU_SEQLENS, rotary))
    torch.testing.assert_close(got, wanted)
    dy = random(*got.shape, seed=8)
    inputs = (query, key, value)
    for have, want in zip(
        torch.autograd.grad(got, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True
    ):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_taken"),
    [
        (torch.bfloat16, 8, True),
        (torch.float16, 256, True),
        (torch.bfloat16, 4, False),
        (torch.bfloat16, 100, False),
        (torch.bfloat16, 264, False),
        (torch.float32, 64, False),
    ],
)
def test_heads_that_the_kernel_of_a_gpu_refuses_do_not_go_there(
    dtype: torch.dtype, head_dim: int, is_taken: bool
) -> None:
    assert flash_takes(torch.empty(TOKENS, QUERIES, head_dim, dtype=dtype)) is is_taken
