"""Attention on packed rows: splits the qkv output into rotated heads, and keeps documents apart.

Both functions save only what their gradients need: ``rotated_heads`` nothing but the tables that
all layers share (and its input, if heads are normed), ``packed_attention`` its inputs, its output
and one number per token and head.

S tokens, N attention heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._tensor_parallel.kernels import kernels_for
from nemotron.steps._tensor_parallel.prologue import RMSNormPrologue

Rotary = tuple[Tensor, Tensor]


class HeadNorms(NamedTuple):
    """RMS norms of every query and every key head (Qwen3), with weights [D]."""

    query: RMSNormPrologue
    key: RMSNormPrologue


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of a micro batch; all layers share one of these, with what it has computed.

    Attributes:
        cu_seqlens: Boundaries of the documents, from 0 to S.
        rotary: The result of ``rotary_tables``.
    """

    cu_seqlens: Sequence[int]
    rotary: Rotary

    @cached_property
    def bounds(self) -> Tensor:
        """The boundaries on the device of the tables, int32."""
        bounds = torch.tensor(self.cu_seqlens, dtype=torch.int32)
        # A blocking copy would wait for all earlier work on the GPU.
        return bounds.to(self.rotary[0].device, non_blocking=True)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in pairwise(self.cu_seqlens))


def rotary_tables(
    config: DecoderConfig, cu_seqlens: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Rotary:
    """Return cosine, [S, 1, 1, D], and sine, [S, 1, 1, D / 2], of every token's angles.

    Both halves of a head have the same angles; the cosine is repeated for the second half.
    """
    num_tokens = cu_seqlens[-1]
    bounds = torch.tensor(cu_seqlens).to(device, non_blocking=True)
    # With the size given, the host need not wait for the GPU to compute it.
    starts_S = bounds[:-1].repeat_interleave(bounds.diff(), output_size=num_tokens)
    positions_S = torch.arange(num_tokens, device=device) - starts_S
    frequencies = rotary_frequencies(config).to(device, non_blocking=True)
    angles = positions_S.float().unsqueeze(1) * frequencies
    cos, sin = (table.to(dtype)[:, None, None] for table in (angles.cos(), angles.sin()))
    return torch.cat([cos, cos], dim=-1), sin


def rotary_frequencies(config: DecoderConfig) -> Tensor:
    """Return the angle per position of every pair of features, [D / 2] fp32.

    In fp32, as all other implementations compute them: checkpoints were trained with this rounding.

    Llama 3.1's ``rope_scaling`` keeps the high frequencies, divides the low ones by ``factor`` and
    blends between.
    """
    pairs = torch.arange(0, config.kv_channels, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rotary_base ** (pairs / config.kv_channels)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * frequencies / (2.0 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling["factor"])


def rotated_heads(
    qkv_SGXD: Tensor, rotary: Rotary, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [S, N, D], keys [S, G, D] and values [S, G, D], the first two rotated.

    Args:
        qkv_SGXD: linear_qkv's output, [S, G, N / G + 2, D]: of each KV group its queries, its key
            and its value.
        rotary: The result of ``rotary_tables``.
        norms: Norms of the heads before they are rotated.

    Feature i of a head's first half is rotated with feature i of its second half, as in checkpoints
    of Llama. Source: Su et al. 2021 (arXiv:2104.09864), equation 34.
    """
    return _RotatedHeads.apply(qkv_SGXD, *rotary, norms)


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_SGXD: Tensor, cos: Tensor, sin: Tensor, norms: HeadNorms | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = _split(qkv_SGXD)
        kept: list[Tensor] = []
        if norms is not None:
            (query, q_rms), (key, k_rms) = _normed(query, norms.query), _normed(key, norms.key)
            kept = [qkv_SGXD, q_rms, k_rms]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.norms, ctx.shape = norms, qkv_SGXD.shape
        heads = _rotate(query, cos, sin), _rotate(key, cos, sin), value.contiguous()
        query_SND, key_SGD, value_SGD = (each.flatten(1, 2) for each in heads)
        return query_SND, key_SGD, value_SGD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *kept = ctx.saved_tensors
        dqkv = grad_outputs[0].new_empty(ctx.shape)
        parts = _split(dqkv)
        dquery, dkey, dvalue = (
            gradient.view(part.shape) for gradient, part in zip(grad_outputs, parts, strict=True)
        )
        # The gradient of a rotation is the rotation by the negative angle.
        _rotate(dquery, cos, -sin, out=parts[0])
        _rotate(dkey, cos, -sin, out=parts[1])
        parts[2].copy_(dvalue)
        if ctx.norms is not None:
            heads, rms = _split(kept[0]), kept[1:]
            for each in (0, 1):
                part = _norm_gradient(ctx.norms[each], parts[each], heads[each], rms[each])
                parts[each].copy_(part)
        return dqkv, None, None, None


def _split(qkv_SGXD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of queries [S, G, N / G, D], keys and values [S, G, 1, D]."""
    return qkv_SGXD[:, :, :-2], qkv_SGXD[:, :, -2:-1], qkv_SGXD[:, :, -1:]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``[a cos - b sin, b cos + a sin]`` of heads [a, b], [S, G, heads of a group, D]."""
    if out is None:
        out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    if kernels := kernels_for(heads):
        kernels.rotate(heads, cos, sin, out=out)
        return out
    (a, b), (out_a, out_b) = heads.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(heads, cos, out=out)
    out_a.addcmul_(b, sin, value=-1.0)
    out_b.addcmul_(a, sin)
    return out


def _normed(heads: Tensor, norm: RMSNormPrologue) -> tuple[Tensor, Tensor]:
    x = heads.reshape(-1, heads.shape[-1])
    normed = torch.empty_like(x)
    inv_rms = norm.apply(x, out=normed)
    return normed.view(heads.shape), inv_rms


def _norm_gradient(norm: RMSNormPrologue, dy: Tensor, heads: Tensor, inv_rms: Tensor) -> Tensor:
    dy, x = (each.reshape(-1, each.shape[-1]) for each in (dy, heads))
    return norm.gradient(dy, x, inv_rms).view(heads.shape)


def packed_attention(
    query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, documents: PackedDocuments
) -> Tensor:
    """Return causal attention within each document, [S, N, D].

    On a GPU flash attention over all documents at once, where it takes their heads. On a CPU one
    flash kernel a document: exact, and several times faster than one call with a mask, which also
    computes what it masks.
    """
    if query_SND.is_cuda and flash_takes(query_SND):
        return flash_on_gpu(query_SND, key_SGD, value_SGD, documents)
    if query_SND.is_cuda:
        return attention_by_document(query_SND, key_SGD, value_SGD, documents)
    return _FlashOnCpu.apply(query_SND, key_SGD, value_SGD, documents.cu_seqlens)


def flash_takes(query_SND: Tensor) -> bool:
    """Return whether the kernel of ``flash_on_gpu`` takes heads of this type and size.

    Source: ``mha_varlen_fwd`` of torch's flash_api.cpp.
    """
    head_dim = query_SND.shape[2]
    is_half = query_SND.dtype in (torch.bfloat16, torch.float16)
    return is_half and head_dim % 8 == 0 and head_dim <= 256


def flash_on_gpu(
    query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, documents: PackedDocuments
) -> Tensor:
    """Return the same by torch's one kernel for all documents, of heads that ``flash_takes``."""
    varlen_attn, options, has_groups = _varlen_attention()
    if has_groups:
        options = options | {"enable_gqa": query_SND.shape[1] != key_SGD.shape[1]}
    bounds, longest = documents.bounds, documents.longest
    out = varlen_attn(query_SND, key_SGD, value_SGD, bounds, bounds, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_attention() -> tuple[Callable[..., Any], dict[str, Any], bool]:
    """Return torch's function, the options that make it causal, and whether it has a group flag.

    It is made causal by a flag in torch 2.10, and by a window in later versions. Since torch 2.12
    grouped heads need a flag of their own.
    """
    # Imported here, because it imports torch's compiler: half a second of every start otherwise.
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    has_window = "window_size" in parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    return varlen_attn, options, "enable_gqa" in parameters


class _FlashOnCpu(torch.autograd.Function):
    """The kernels that ``scaled_dot_product_attention`` runs on a CPU, with one output tensor.

    Through ``scaled_dot_product_attention``, each document's output would be held twice: by
    autograd, and in the tensor that all outputs are concatenated to.
    """

    @staticmethod
    def forward(
        ctx: Any, query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, cu_seqlens: Sequence[int]
    ) -> Tensor:
        out_SND = torch.empty_like(query_SND)
        log_sum_SN = query_SND.new_empty(
            query_SND.shape[:2], dtype=torch.promote_types(query_SND.dtype, torch.float32)
        )
        documents = (_by_document(each, cu_seqlens) for each in (query_SND, key_SGD, value_SGD))
        outs = _by_document(out_SND, cu_seqlens), _by_document(log_sum_SN, cu_seqlens)
        for *heads, out, log_sum in zip(*documents, *outs, strict=True):
            computed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
            out.copy_(computed[0])
            log_sum.copy_(computed[1])
        ctx.save_for_backward(query_SND, key_SGD, value_SGD, out_SND, log_sum_SN)
        ctx.cu_seqlens = cu_seqlens
        return out_SND

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: recomputed activations can be had no second time
        gradients = [torch.empty_like(each) for each in saved[:3]]
        tensors = (*grad_outputs, *saved, *gradients)
        documents = (_by_document(each, ctx.cu_seqlens) for each in tensors)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for dout, query, key, value, out, log_sum, *parts in zip(*documents, strict=True):
            computed = backward(dout, query, key, value, out, log_sum, 0.0, True)
            for part, gradient in zip(parts, computed, strict=True):
                part.copy_(gradient)
        return *gradients, None


def attention_by_document(
    query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, documents: PackedDocuments
) -> Tensor:
    """Return the same by one call per document, for any type on any device."""
    num_heads = query_SND.shape[1]
    heads = query_SND, for_every_head(key_SGD, num_heads), for_every_head(value_SGD, num_heads)
    by_document = (_by_document(each, documents.cu_seqlens) for each in heads)
    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    outs = [attend(*heads).squeeze(0).transpose(0, 1) for heads in zip(*by_document, strict=True)]
    return torch.cat(outs)


def for_every_head(heads_SGD: Tensor, num_heads: int) -> Tensor:
    """Return keys or values repeated for every query head, [S, N, D].

    On a GPU only the flash kernel supports groups, and it takes neither fp32 nor a mask; without
    it, torch would hold all scores.
    """
    return heads_SGD.repeat_interleave(num_heads // heads_SGD.shape[1], dim=1)


def _by_document(tokens: Tensor, cu_seqlens: Sequence[int]) -> tuple[Tensor, ...]:
    """Return each document's part of [S, N, ...] as a batch of one, [1, N, S, ...]."""
    lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
    return tokens.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
