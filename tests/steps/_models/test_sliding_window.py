"""Windowed attention against one masked product over the whole document."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nemotron.steps._models.attention import PackedDocuments, packed_attention
from nemotron.steps._models.sliding_window import windowed_attention

CU_SEQLENS = (0, 1, 9, 40)
DOCUMENTS = PackedDocuments(CU_SEQLENS, rotary=(torch.empty(0), torch.empty(0)))


def heads(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(40, count, 6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("window_size", [1, 3, 8, 31])
def test_windowed_attention_sees_the_last_tokens_of_its_document_only(window_size: int) -> None:
    query, key, value = heads(4), heads(2), heads(1).expand(-1, 2, -1)
    inputs = [each.clone().requires_grad_() for each in (query, key, value)]
    q, k, v = inputs
    got = windowed_attention(q, k, v, DOCUMENTS, window_size=window_size)
    documents = torch.cat(
        [torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(CU_SEQLENS))]
    )
    distance = torch.arange(40).unsqueeze(1) - torch.arange(40)
    is_seen = (documents.unsqueeze(1) == documents) & (distance >= 0) & (distance < window_size)
    plain = [each.clone().requires_grad_() for each in (query, key, value)]
    wide = [plain[0], *(each.repeat_interleave(2, dim=1) for each in plain[1:])]
    scores = torch.einsum("snd,tnd->nst", wide[0], wide[1]) / 6**0.5
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(dim=2)
    wanted = torch.einsum("nst,tnd->snd", weights, wide[2])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    seed = torch.randn(40, 4, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, seed),
        torch.autograd.grad(wanted, plain, seed),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_window_of_the_whole_document_is_plain_causal_attention() -> None:
    inputs = heads(4), heads(2), heads(2)
    got = windowed_attention(*inputs, DOCUMENTS, window_size=31)
    assert torch.equal(got, packed_attention(*inputs, DOCUMENTS))
