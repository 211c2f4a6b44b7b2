"""The core: frozen base + LoRA in one autograd function per linear, with one collective each way.

The base weight and one LoRA factor lie side by side in one extended matrix, so that one GEMM
multiplies by both. The results of the base shard and of the LoRA shard are added on each rank, and
one collective follows. Between the linears, activations are either replicated over the
tensor-parallel ranks or, with sequence parallelism, split over the sequence.

Letters: S tokens, H input features, F output features, R LoRA rank (``peft.dim``, rounded up here
to a multiple of 8), T tensor-parallel size; ``scale`` is that of ``LoraSpec``. The factors are
passed in the dtype of their masters (fp32) and used in that of the activations.

A prologue (RMS norm or SwiGLU) is part of the linear. In the formulas below x is the output of the
prologue; its input is what is saved, and backward computes again what it needs of the output. With
a dropout of p, x stands for ``x * mask`` wherever it is multiplied by A, and the scale is divided
by 1 - p: in a mask, 1 / (1 - p) would be rounded to the type of the activations. Masks are drawn
again instead of saved. Nothing is saved or computed for a gradient of the frozen base, and dx is
computed only where it is needed.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), equation 3; tensor parallelism, Shoeybi et al. 2019
(arXiv:1909.08053), section 3; sequence parallelism, Korthikanti et al. 2022 (arXiv:2205.05198),
section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_reduce,
    all_reduce_async,
    empty_to_send,
    scatter_sum_rows,
    scatter_sum_rows_async,
    use_rows,
)
from nemotron.steps._tensor_parallel.prologue import Mask, Prologue, dropped

Gradients = tuple[Tensor | None, ...]  # of a forward's arguments, as autograd wants them


class _ColumnGradients(NamedTuple):
    """Gradients of a column-parallel linear behind its prologue; None where they are not wanted.

    ``recomputed`` is what the prologue has computed again and needs for its own backward.
    """

    dx: Tensor | None  # [S, H], or [S / T, H]
    da: Tensor | None  # [R, H]
    db: Tensor | None  # [F / T, R]
    recomputed: Tensor | None


class ColumnParallel(torch.autograd.Function):
    """Base + LoRA with W and B split over their output features. Per rank:

        x        [S, H]            replicated; or, over the sequence, this rank's rows, [S / T, H]
        extended [F / T, H + R]    [W | scale B]: base shard, and the lora_b shard
        a        [R, H]            lora_a, replicated
        y        [S, F / T]        whole sequence, features sharded

    x is also returned as a second output: the residual that goes around the block. Its gradient
    therefore arrives here, and the prologue's backward adds it in a pass that it makes anyway.
    With replicated activations:

        forward  y = [x | x A^T] [W | scale B]^T                                no collective
        dgrad    [dx | dh] = dy [W | scale B] ;  dx = all_reduce(dx + dh A)     the one collective
        adapter  dB = scale dy^T h, complete for the shard ;  dA = dh^T x, partial: own features

    Both adapter gradients are computed while the all-reduce of dx is in flight. With sequence
    parallelism:

        forward  [x | h] = all_gather([x | x A^T]) ;  y = [x | h] [W | scale B]^T
        dgrad    [dx | dh] = reduce_scatter(dy [W | scale B]) ;  dx += dh A
        adapter  dB = scale dy^T h, complete for the shard ;  dA = dh^T x, partial: own rows

    Each rank applies A to its own S / T tokens; h and dh are sent along as R more columns, so the
    gathered x is neither saved nor gathered again. dB is computed while the reduce-scatter is in
    flight.

    The partial dA of all layers are summed once per optimizer step, in one flat all-reduce. Saved
    are x of this rank's rows (for dA) and h of all rows (for dB).
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
        sequence_parallel: bool,
    ) -> tuple[Tensor, Tensor]:
        rank, in_features = lora_a_RH.shape
        # The factor is copied into the matrix at every call (R / H of the matrix), so that an
        # optimizer may change lora_b (in RowParallel: lora_a) without telling anyone. The matrix is
        # not one of autograd's saved tensors: the copy would count as a modification, although
        # within a step, which has dropout on or off throughout, it changes no value.
        extended[:, in_features:] = lora_b_FR * scale
        lora_a_RH = lora_a_RH.to(x_SH.dtype)
        # With replicated activations this rank already has all rows.
        gathered_from = group if sequence_parallel else ProcessGroup()
        x_h = empty_to_send(x_SH, in_features + rank, gathered_from)
        input_SH, own_h_SR = x_h.split([in_features, rank], dim=1)
        if prologue is None:
            statistic = x_SH.new_empty(0)
            input_SH.copy_(x_SH)
        else:
            statistic = prologue.apply(x_SH, out=input_SH)
        torch.mm(dropped(input_SH, mask), lora_a_RH.T, out=own_h_SR)
        num_tokens = len(x_SH) * gathered_from.size
        y_SF, h_SR = (x_SH.new_empty(num_tokens, size) for size in (len(extended), rank))

        def multiply(x_h: Tensor, rows: slice) -> None:
            torch.mm(x_h, extended.T, out=y_SF[rows])
            h_SR[rows] = x_h[:, in_features:]

        use_rows(x_h, gathered_from, multiply)()
        _save(ctx, x_SH, statistic, h_SR, lora_a_RH, prologue, mask)
        ctx.extended, ctx.scale, ctx.master_dtype = extended, scale, lora_b_FR.dtype
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return y_SF, x_SH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        dy_SF, dresidual_SH = grad_outputs
        saved = ctx.saved_tensors  # recomputed activations can be unpacked only once
        in_features = saved[-1].shape[1]
        # Where dx is not needed, only the R columns of dh are computed and sent.
        columns = ctx.extended if ctx.needs_input_grad[0] else ctx.extended[:, in_features:]
        dx_dh = empty_to_send(dy_SF, columns.shape[1], ctx.group)
        torch.mm(dy_SF, columns, out=dx_dh)
        finish = _finish_backward_sequence if ctx.sequence_parallel else _finish_backward_replicated
        found = finish(ctx, saved, dy_SF, dx_dh)
        dx_SH = _through_prologue(ctx, found.dx, saved, found.recomputed, dresidual_SH)
        return dx_SH, found.da, found.db, *[None] * 6


def _finish_backward_replicated(
    ctx: Any, saved: tuple[Tensor, ...], dy_SF: Tensor, dx_dh: Tensor
) -> _ColumnGradients:
    """Complete the gradients where activations are replicated."""
    x_SH, statistic, h_SR, lora_a_RH = saved
    dx_SH = wait = None
    dh_SR = dx_dh[:, dx_dh.shape[1] - len(lora_a_RH) :]
    if ctx.needs_input_grad[0]:
        dx_SH = _add_lora(dx_dh[:, : lora_a_RH.shape[1]], dh_SR, lora_a_RH, ctx.mask)
        if ctx.group.size > 1:
            # dx is sent together with dh (R / H more bytes), which saves copying it out first.
            dh_SR = dh_SR.clone()
            dx_dh, wait = all_reduce_async(dx_dh, ctx.group)
            dx_SH = dx_dh[:, : lora_a_RH.shape[1]]
    db_FR = _lora_b_gradient(ctx, dy_SF, h_SR)
    da_RH, recomputed = _lora_a_gradient(ctx, dh_SR, x_SH, statistic)
    if wait is not None:
        wait()
    return _ColumnGradients(dx_SH, da_RH, db_FR, recomputed)


def _finish_backward_sequence(
    ctx: Any, saved: tuple[Tensor, ...], dy_SF: Tensor, dx_dh: Tensor
) -> _ColumnGradients:
    """Complete the gradients where activations are split over the sequence."""
    x_SH, statistic, h_SR, lora_a_RH = saved
    dx_dh, wait = scatter_sum_rows_async(dx_dh, ctx.group)
    db_FR = _lora_b_gradient(ctx, dy_SF, h_SR)
    wait()
    dx_SH = None
    dh_SR = dx_dh[:, dx_dh.shape[1] - len(lora_a_RH) :]
    da_RH, recomputed = _lora_a_gradient(ctx, dh_SR, x_SH, statistic)
    if ctx.needs_input_grad[0]:
        dx_SH = _add_lora(dx_dh[:, : lora_a_RH.shape[1]], dh_SR, lora_a_RH, ctx.mask)
    return _ColumnGradients(dx_SH, da_RH, db_FR, recomputed)


class RowParallel(torch.autograd.Function):
    """Base + LoRA with W and A split over their input features, added to a residual. Per rank:

        x        [S, H / T]        whole sequence, features sharded
        extended [F + R, H / T]    [W ; A]: base shard, and the lora_a shard
        b        [F, R]            lora_b, replicated
        y        [S, F]            replicated; or, over the sequence, this rank's rows, [S / T, F]

        forward  [y | h] = all_reduce(x [W ; A]^T) ;  y += scale h B^T + residual
        dgrad    dh = scale dy B ;  dx = dy W + dh A                            no collective
        adapter  dA = dh^T x, complete for the shard ;  dB = scale dy^T h, complete

    h is sent in the collective of the base output (R / F more bytes) and is complete afterwards, so
    every rank computes the whole dB, bit for bit the same, and nothing is left to synchronise. With
    sequence parallelism:

        forward  [y | h] = reduce_scatter(x [W ; A]^T) ;  y += scale h B^T + residual
        dgrad    [dy | dh] = all_gather([dy | scale dy B]) ;  dx = dy W + dh A
        adapter  dA = dh^T x, complete for the shard ;  dB = scale dy^T h, partial: own rows only

    dB is computed while the all-gather is in flight. Saved are x (for dA) and h of this rank's rows
    (for dB).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        lora_a_RH: Tensor,
        lora_b_FR: Tensor,
        residual_SF: Tensor | None,
        extended: Tensor,
        scale: float,
        prologue: Prologue | None,
        mask: Mask | None,
        group: ProcessGroup,
        sequence_parallel: bool,
    ) -> Tensor:
        out_features, rank = lora_b_FR.shape
        extended[out_features:] = lora_a_RH
        input_SH, statistic = x_SH, x_SH.new_empty(0)
        if prologue is not None:
            input_SH = x_SH.new_empty(len(x_SH), extended.shape[1])
            statistic = prologue.apply(x_SH, out=input_SH)
        y_h = empty_to_send(input_SH, len(extended), group)
        torch.mm(input_SH, extended.T, out=y_h)
        if mask is not None:
            y_h[:, out_features:] = dropped(input_SH, mask) @ extended[out_features:].T
        y_h = scatter_sum_rows(y_h, group) if sequence_parallel else all_reduce(y_h, group)
        y_SF, h_SR = y_h.split([out_features, rank], dim=1)
        y_SF.addmm_(h_SR, lora_b_FR.to(x_SH.dtype).T, alpha=scale)
        if residual_SF is not None:
            y_SF.add_(residual_SF)
        _save(ctx, x_SH, statistic, h_SR, lora_b_FR, prologue, mask)
        ctx.extended, ctx.scale, ctx.master_dtype = extended, scale, lora_b_FR.dtype
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return y_SF

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dy_SF,) = grad_outputs
        saved = ctx.saved_tensors
        x_SH, statistic, h_SR, lora_b_FR = saved
        dh_SR = (dy_SF @ lora_b_FR.to(dy_SF.dtype)).mul_(ctx.scale)
        dx_SH, dh_all_SR, wait = _dgrad_of_all(ctx, dy_SF, dh_SR)
        db_FR = _lora_b_gradient(ctx, dy_SF, h_SR)
        wait()
        da_RH, recomputed = _lora_a_gradient(ctx, dh_all_SR, x_SH, statistic)
        if dx_SH is not None:
            dx_SH = _add_lora(dx_SH, dh_all_SR, ctx.extended[dy_SF.shape[1] :], ctx.mask)
        dx_SH = _through_prologue(ctx, dx_SH, saved, recomputed)
        dresidual_SF = dy_SF if ctx.needs_input_grad[3] else None
        return dx_SH, da_RH, db_FR, dresidual_SF, *[None] * 6


def _dgrad_of_all(
    ctx: Any, dy_SF: Tensor, dh_SR: Tensor
) -> tuple[Tensor | None, Tensor, Callable[[], None]]:
    """Return ``dy W`` (None where dx is not needed), dh of all rows, and a function that waits.

    The rows of dy and dh are gathered in one collective; both results are complete after the wait.
    """
    group = ctx.group
    out_features, rank = dy_SF.shape[1], dh_SR.shape[1]
    weight_FH = ctx.extended[:out_features]
    if not ctx.sequence_parallel:
        return (dy_SF @ weight_FH if ctx.needs_input_grad[0] else None), dh_SR, lambda: None
    dy_dh = torch.cat([dy_SF, dh_SR], dim=1, out=empty_to_send(dy_SF, out_features + rank, group))
    num_tokens = group.size * len(dy_SF)
    dh_all_SR = dh_SR.new_empty(num_tokens, rank)
    dx_SH = dy_SF.new_empty(num_tokens, weight_FH.shape[1]) if ctx.needs_input_grad[0] else None

    def multiply(dy_dh: Tensor, rows: slice) -> None:
        dy_part, dh_part = dy_dh.split([out_features, rank], dim=1)
        dh_all_SR[rows] = dh_part
        if dx_SH is not None:
            torch.mm(dy_part, weight_FH, out=dx_SH[rows])

    return dx_SH, dh_all_SR, use_rows(dy_dh, group, multiply)


def _save(
    ctx: Any,
    x_SH: Tensor,
    statistic: Tensor,
    h_SR: Tensor,
    factor: Tensor,
    prologue: Prologue | None,
    mask: Mask | None,
) -> None:
    """Save what backward needs: the input only if the adapter or the prologue has a gradient."""
    needs_dx, needs_adapter = ctx.needs_input_grad[:2]
    nothing = x_SH.new_empty(0)  # not a slice of x, which would keep all of it
    if not needs_adapter:
        h_SR = nothing
        if prologue is None or not needs_dx:
            x_SH, statistic = nothing, nothing
    ctx.save_for_backward(x_SH, statistic, h_SR.contiguous(), factor)
    ctx.prologue, ctx.mask = prologue, mask


def _lora_b_gradient(ctx: Any, dy_SF: Tensor, h_SR: Tensor) -> Tensor | None:
    """Return dB = scale dy^T h, [F, R], in the masters' dtype; None where it is not needed."""
    if not ctx.needs_input_grad[1]:
        return None
    # Computed as (h^T dy)^T, which takes a CPU about half the time of dy^T h.
    return (h_SR.T @ dy_SF).mul_(ctx.scale).to(ctx.master_dtype).T


def _lora_a_gradient(
    ctx: Any, dh_SR: Tensor, x_SH: Tensor, statistic: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return dA = dh^T x, [R, H], in the masters' dtype; None where it is not needed.

    The second result is what the prologue has recomputed and needs for its own gradient.
    """
    if not ctx.needs_input_grad[1]:
        return None, None
    recomputed = None
    if ctx.prologue is None:
        da_RH = dh_SR.T @ dropped(x_SH, ctx.mask)
    else:
        da_RH, recomputed = ctx.prologue.lora_a_gradient(dh_SR, x_SH, statistic, ctx.mask)
    return da_RH.to(ctx.master_dtype), recomputed


def _through_prologue(
    ctx: Any,
    dx_SH: Tensor | None,
    saved: tuple[Tensor, ...],
    recomputed: Tensor | None,
    dresidual_SH: Tensor | None = None,
) -> Tensor | None:
    """Return the gradient of the prologue's input, including that of the residual, if any."""
    if dx_SH is None:
        return None
    x_SH, statistic = saved[:2]
    if ctx.prologue is not None:
        return ctx.prologue.gradient(dx_SH, x_SH, statistic, recomputed, dresidual_SH)
    return dx_SH if dresidual_SH is None else dx_SH.add_(dresidual_SH)


def _add_lora(dx_SH: Tensor, dh_SR: Tensor, lora_a_RH: Tensor, mask: Mask | None) -> Tensor:
    """Add ``(dh A) * mask`` to dx, in place, and return it."""
    if mask is None:
        return dx_SH.addmm_(dh_SR, lora_a_RH)
    return dx_SH.addcmul_(dh_SR @ lora_a_RH, mask(dx_SH))
