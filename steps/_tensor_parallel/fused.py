"""The core: frozen base + LoRA in one autograd function per linear, with one collective each way.

Base weight and one LoRA factor lie in one extended matrix, so that one GEMM gives both; base shard
and LoRA shard are added locally; then one collective. ``FusedLora`` keeps activations replicated
between the linears; the two ``SequenceParallel`` functions split them over the sequence.

S tokens, H input features, F output features, R LoRA rank (``peft.dim``), T tensor-parallel size;
scale: ``LoraSpec``'s. Factors come in their masters' dtype (fp32) and are used in the activations'.
A prologue (RMS norm, SwiGLU) is part of the linear: x in the lines below is its output; what is
saved is its input, and it is computed again in the backward pass. With dropout, x in a line about
A is ``x * mask``; masks are drawn again, not saved. Nothing is saved or computed for a gradient of
the frozen base, and dx only where somebody asks for it.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), equation 3; tensor parallelism, Shoeybi et al. 2019
(arXiv:1909.08053), section 3; sequence parallelism, Korthikanti et al. 2022 (arXiv:2205.05198),
section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_reduce,
    all_reduce_async,
    gather_rows,
    gather_rows_async,
    scatter_sum_rows,
    scatter_sum_rows_async,
)
from nemotron.steps._tensor_parallel.prologue import Prologue

Mask = Callable[[Tensor], Tensor]
Gradients = tuple[Tensor | None, ...]


class FusedLora(torch.autograd.Function):
    """Base shard + LoRA shard, added locally, with one all-reduce: forward or backward.

    Column-parallel, W and B split over their output features. Per rank:

        x        [S, H]            replicated
        extended [F / T + R, H]    [W ; A]: base shard, and the replicated lora_a
        b        [F / T, R]        lora_b shard
        y        [S, F / T]        features sharded

        forward  [y | h] = x [W ; A]^T ;  y += scale h B^T                      no collective
        dgrad    dh = scale dy B ;  dx = all_reduce(dy W + dh A)                the one collective
        adapter  dB = scale dy^T h, complete for the shard ;  dA = dh^T x, partial

    dh sees this rank's features only, so dA is a partial sum. It is completed once per optimizer
    step, in one flat all-reduce for all layers. Both adapter gradients are computed while the
    all-reduce of dx is in flight.

    Row-parallel, W and A split over their input features. Per rank:

        x        [S, H / T]        features sharded
        extended [F + R, H / T]    [W ; A]: base shard, and the lora_a shard
        b        [F, R]            lora_b, replicated
        y        [S, F]            replicated

        forward  [y | h] = all_reduce(x [W ; A]^T) ;  y += scale h B^T          the one collective
        dgrad    dh = scale dy B ;  dx = dy W + dh A                            no collective
        adapter  dA = dh^T x, complete for the shard ;  dB = scale dy^T h, complete

    h rides in the collective of the base output, for R / F more bytes, and is complete afterwards:
    every rank computes the whole dB, bit for bit the same, and nothing is left to synchronise.

    Saved: x (for dA) and h (for dB).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        lora_a_RH: Tensor,
        lora_b_FR: Tensor,
        extended: Tensor,
        scale: float,
        prologue: Prologue | None,
        mask: Mask | None,
        forward_group: ProcessGroup,
        backward_group: ProcessGroup,
    ) -> Tensor:
        input_SH, kept = _prologue(prologue, x_SH)
        y_ext = all_reduce(_extended_gemm(input_SH, lora_a_RH, extended, mask), forward_group)
        y_SF, h_SR = y_ext.split([len(lora_b_FR), len(lora_a_RH)], dim=1)
        y_SF.addmm_(h_SR, lora_b_FR.to(x_SH.dtype).T, alpha=scale)
        _save(ctx, x_SH, kept, h_SR, lora_b_FR, prologue, mask)
        ctx.extended, ctx.scale, ctx.group = extended, scale, backward_group
        ctx.master_dtype = lora_b_FR.dtype
        return y_SF

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy_SF,) = grad_outputs
        x_SH, kept, h_SR, lora_b_FR = ctx.saved_tensors
        dh_SR = (dy_SF @ lora_b_FR.to(dy_SF.dtype)).mul_(ctx.scale)
        dx_SH = db_FR = wait = None
        if ctx.needs_input_grad[0]:
            weight_FH, lora_a_RH = ctx.extended.split([dy_SF.shape[1], dh_SR.shape[1]])
            dx_SH = _add_lora(dy_SF @ weight_FH, dh_SR, lora_a_RH, ctx.mask)
            dx_SH, wait = all_reduce_async(dx_SH, ctx.group)
        if ctx.needs_input_grad[1]:
            db_FR = _lora_b_gradient(ctx, dy_SF, h_SR)
        da_RH, part = _lora_a_gradient(ctx, dh_SR, x_SH, kept)
        if wait is not None:
            wait()
        dx_SH = _through_prologue(ctx, dx_SH, x_SH, kept, part)
        return dx_SH, da_RH, db_FR, None, None, None, None, None, None


class SequenceParallelColumn(torch.autograd.Function):
    """Column-parallel base + LoRA on activations that are split over the sequence. Per rank:

        x        [S / T, H]        this rank's rows of the sequence
        extended [F / T, H + R]    [W | scale B]: base shard, and the lora_b shard
        a        [R, H]            lora_a, replicated
        y        [S, F / T]        whole sequence, features sharded

        forward  [x | h] = all_gather([x | x A^T]) ;  y = [x | h] [W | scale B]^T
        dgrad    [dx | dh] = reduce_scatter(dy [W | scale B]) ;  dx += dh A
        adapter  dB = scale dy^T h, complete for the shard ;  dA = dh^T x, partial: own rows only

    A is applied to S / T tokens only; h and dh ride along as R more columns, so the gathered x is
    neither saved nor gathered again. dB is computed while the reduce-scatter is in flight.
    Saved: x of this rank's rows (for dA) and h of all rows (for dB).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        lora_a_RH: Tensor,
        lora_b_FR: Tensor,
        extended: Tensor,
        scale: float,
        prologue: Prologue | None,
        mask: Mask | None,
        group: ProcessGroup,
    ) -> Tensor:
        in_features = x_SH.shape[1]
        extended[:, in_features:] = lora_b_FR * scale
        lora_a_RH = lora_a_RH.to(x_SH.dtype)
        input_SH, kept = _prologue(prologue, x_SH)
        h_SR = _dropped(input_SH, mask) @ lora_a_RH.T
        gathered = gather_rows(torch.cat([input_SH, h_SR], dim=1), group)
        _save(ctx, x_SH, kept, gathered[:, in_features:], lora_a_RH, prologue, mask)
        ctx.extended, ctx.scale, ctx.group = extended, scale, group
        ctx.master_dtype = lora_b_FR.dtype
        return gathered @ extended.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy_SF,) = grad_outputs
        x_SH, kept, h_SR, lora_a_RH = ctx.saved_tensors
        needs_dx, needs_adapter = ctx.needs_input_grad[:2]
        in_features = lora_a_RH.shape[1]
        # Without dx only the R columns of dh are left to compute and to send.
        columns = ctx.extended if needs_dx else ctx.extended[:, in_features:]
        dx_dh, wait = scatter_sum_rows_async(dy_SF @ columns, ctx.group)
        db_FR = _lora_b_gradient(ctx, dy_SF, h_SR) if needs_adapter else None
        wait()
        dh_SR = dx_dh[:, in_features:] if needs_dx else dx_dh
        da_RH, part = _lora_a_gradient(ctx, dh_SR, x_SH, kept)
        dx_SH = None
        if needs_dx:
            dx_SH = _add_lora(dx_dh[:, :in_features], dh_SR, lora_a_RH, ctx.mask)
            dx_SH = _through_prologue(ctx, dx_SH, x_SH, kept, part)
        return dx_SH, da_RH, db_FR, None, None, None, None, None


class SequenceParallelRow(torch.autograd.Function):
    """Row-parallel base + LoRA whose output is split over the sequence. Per rank:

        x        [S, H / T]        whole sequence, features sharded
        extended [F + R, H / T]    [W ; A]: base shard, and the lora_a shard
        b        [F, R]            lora_b, replicated
        y        [S / T, F]        this rank's rows of the sequence

        forward  [y | h] = reduce_scatter(x [W ; A]^T) ;  y += scale h B^T
        dgrad    [dy | dh] = all_gather([dy | scale dy B]) ;  dx = [dy | dh] [W ; A]
        adapter  dA = dh^T x, complete for the shard ;  dB = scale dy^T h, partial: own rows only

    dB is computed while the all-gather is in flight. Saved: x (for dA) and h of this rank's rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        lora_a_RH: Tensor,
        lora_b_FR: Tensor,
        extended: Tensor,
        scale: float,
        prologue: Prologue | None,
        mask: Mask | None,
        group: ProcessGroup,
    ) -> Tensor:
        input_SH, kept = _prologue(prologue, x_SH)
        y_ext = scatter_sum_rows(_extended_gemm(input_SH, lora_a_RH, extended, mask), group)
        y_SF, h_SR = y_ext.split([len(lora_b_FR), len(lora_a_RH)], dim=1)
        y_SF.addmm_(h_SR, lora_b_FR.to(x_SH.dtype).T, alpha=scale)
        _save(ctx, x_SH, kept, h_SR, lora_b_FR, prologue, mask)
        ctx.extended, ctx.scale, ctx.group = extended, scale, group
        ctx.master_dtype = lora_b_FR.dtype
        return y_SF

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy_SF,) = grad_outputs
        x_SH, kept, h_SR, lora_b_FR = ctx.saved_tensors
        needs_dx, needs_adapter = ctx.needs_input_grad[:2]
        dh_SR = (dy_SF @ lora_b_FR.to(dy_SF.dtype)).mul_(ctx.scale)
        gathered, wait = gather_rows_async(torch.cat([dy_SF, dh_SR], dim=1), ctx.group)
        db_FR = _lora_b_gradient(ctx, dy_SF, h_SR) if needs_adapter else None
        wait()
        parts = [dy_SF.shape[1], dh_SR.shape[1]]
        dy_all_SF, dh_all_SR = gathered.split(parts, dim=1)
        da_RH, part = _lora_a_gradient(ctx, dh_all_SR, x_SH, kept)
        dx_SH = None
        if needs_dx and ctx.mask is None:
            dx_SH = gathered @ ctx.extended
        elif needs_dx:
            weight_FH, lora_a_RH = ctx.extended.split(parts)
            dx_SH = _add_lora(dy_all_SF @ weight_FH, dh_all_SR, lora_a_RH, ctx.mask)
        dx_SH = _through_prologue(ctx, dx_SH, x_SH, kept, part)
        return dx_SH, da_RH, db_FR, None, None, None, None, None


def _extended_gemm(x_SH: Tensor, lora_a_RH: Tensor, extended: Tensor, mask: Mask | None) -> Tensor:
    """Return ``[x W^T | (x * mask) A^T]``, [S, F + R]: one GEMM where there is no dropout.

    lora_a is copied into the extended matrix at every call, R / F of its size, so that an optimizer
    may change lora_a without telling anyone. The matrix is kept off autograd's saved tensors: that
    copy changes no value within a step, but would look like a change.
    """
    out_features = len(extended) - len(lora_a_RH)
    extended[out_features:].copy_(lora_a_RH)
    y_ext = x_SH @ extended.T
    if mask is not None:
        y_ext[:, out_features:] = (x_SH * mask(x_SH)) @ extended[out_features:].T
    return y_ext


def _prologue(prologue: Prologue | None, x_SH: Tensor) -> tuple[Tensor, Tensor]:
    return (x_SH, x_SH.new_empty(0)) if prologue is None else prologue.apply(x_SH)


def _save(
    ctx: Any,
    x_SH: Tensor,
    kept: Tensor,
    h_SR: Tensor,
    factor: Tensor,
    prologue: Prologue | None,
    mask: Mask | None,
) -> None:
    """Keep what backward needs: the input only where an adapter or a prologue asks for it."""
    needs_dx, needs_adapter = ctx.needs_input_grad[:2]
    nothing = x_SH.new_empty(0)  # not a slice of x, which would keep all of it
    if not needs_adapter:
        h_SR = nothing
        if prologue is None or not needs_dx:
            x_SH, kept = nothing, nothing
    ctx.save_for_backward(x_SH, kept, h_SR.contiguous(), factor)
    ctx.prologue, ctx.mask = prologue, mask


def _lora_b_gradient(ctx: Any, dy_SF: Tensor, h_SR: Tensor) -> Tensor:
    """Return dB = scale dy^T h, [F, R], in the masters' dtype."""
    return (dy_SF.T @ h_SR).mul_(ctx.scale).to(ctx.master_dtype)


def _lora_a_gradient(
    ctx: Any, dh_SR: Tensor, x_SH: Tensor, kept: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return dA = dh^T x, [R, H], in the masters' dtype, where it is wanted.

    The second result is what the prologue's gradient takes of the prologue, computed once more.
    """
    part = None
    if ctx.prologue is not None:
        x_SH, part = ctx.prologue.again(x_SH, kept)
    if not ctx.needs_input_grad[1]:
        return None, part
    return (dh_SR.T @ _dropped(x_SH, ctx.mask)).to(ctx.master_dtype), part


def _through_prologue(
    ctx: Any, dx_SH: Tensor | None, x_SH: Tensor, kept: Tensor, part: Tensor | None
) -> Tensor | None:
    if dx_SH is None or part is None:
        return dx_SH
    return ctx.prologue.gradient(dx_SH, x_SH, kept, part)


def _dropped(x_SH: Tensor, mask: Mask | None) -> Tensor:
    return x_SH if mask is None else x_SH * mask(x_SH)


def _add_lora(dx_SH: Tensor, dh_SR: Tensor, lora_a_RH: Tensor, mask: Mask | None) -> Tensor:
    """Add ``(dh A) * mask`` to dx, in place, and return it."""
    if mask is None:
        return dx_SH.addmm_(dh_SR, lora_a_RH)
    return dx_SH.addcmul_(dh_SR @ lora_a_RH, mask(dx_SH))
