"""Causal attention to the last W tokens only, as in Mistral's first models and some Qwen models.

S tokens, N attention heads, G key/value heads, D head dimension, W window size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.steps._models.attention import PackedDocuments, for_every_head, packed_attention


def windowed_attention(
    query_SND: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    documents: PackedDocuments,
    *,
    window_size: int,
) -> Tensor:
    """Return attention of each token to itself and the W - 1 before it in its document, [S, N, D].

    Queries are taken in blocks of W, each with at most 2 W - 1 keys, so that compute and memory
    grow with the length of a document, not with its square. If no document is longer than W, this
    is plain attention, which needs no mask.

    Args:
        query_SND: Queries.
        key_SGD: Keys; every one serves N / G query heads.
        value_SGD: Values.
        documents: Where the documents lie.
        window_size: W, tokens.

    Source: Beltagy et al. 2020 (arXiv:2004.05150), section 3.1, causal.
    """
    if documents.longest <= window_size:
        return packed_attention(query_SND, key_SGD, value_SGD, documents)
    if query_SND.is_cuda:
        num_heads = query_SND.shape[1]
        key_SGD, value_SGD = (for_every_head(each, num_heads) for each in (key_SGD, value_SGD))
    outs = []
    for begin, end in pairwise(documents.cu_seqlens):
        for start in range(begin, end, window_size):
            stop = min(start + window_size, end)
            first = max(begin, start - window_size + 1)
            visible = _visible(start, stop, first, window_size, query_SND.device)
            heads = (query_SND[start:stop], key_SGD[first:stop], value_SGD[first:stop])
            query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in heads)
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=visible, enable_gqa=key.shape[1] != query.shape[1]
            )
            outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _visible(start: int, stop: int, first: int, window_size: int, device: torch.device) -> Tensor:
    """Return which of the keys [first, stop) each of the queries [start, stop) sees."""
    queries = torch.arange(start, stop, device=device).unsqueeze(1)
    keys = torch.arange(first, stop, device=device)
    return (keys <= queries) & (keys > queries - window_size)
