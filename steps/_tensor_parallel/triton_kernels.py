"""What the core computes row by row on a GPU, each as one Triton kernel.

In torch's operations, every step of a norm, an activation or a softmax reads and writes its tensor.
Here a value is read once and written once. Formulas and roundings are those of the torch code that
runs on a CPU, in ``prologue``, ``vocabulary`` and ``attention``; only sums are taken in another
order. Everything is computed in fp32.

Rows may lie apart (a stride); the elements of a row lie side by side.

S tokens, H features, F output features of SwiGLU, C tokens of a chunk, V vocabulary (of this rank).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS_OF_A_PROGRAM = 2048  # at least, if its rows are short
_COLUMNS_AT_A_TIME = 1024  # of an activation
_LOGITS_AT_A_TIME = 4096
_LEAST: tl.constexpr = tl.constexpr(-3.0e38)  # below every logit; -inf - -inf would be NaN


def rms_norm(x_SH: Tensor, weight_H: Tensor, epsilon: float, *, out: Tensor) -> Tensor:
    """Write ``weight * x / rms(x)`` into ``out``, [S, H], and return 1 / rms(x), [S, 1] fp32."""
    inv_rms_S1 = x_SH.new_empty(len(x_SH), 1, dtype=torch.float32)
    strides = x_SH.stride(0), out.stride(0)
    tensors = x_SH, weight_H, out, inv_rms_S1
    grid, sizes = _whole_rows(x_SH)
    _launch(_rms_norm, grid, *tensors, *x_SH.shape, *strides, epsilon, **sizes)
    return inv_rms_S1


def rms_norm_gradient(
    dy_SH: Tensor, x_SH: Tensor, inv_rms_S1: Tensor, weight_H: Tensor, added_SH: Tensor | None
) -> Tensor:
    """Return the gradient of ``rms_norm``'s input, plus ``added_SH`` if given, [S, H]."""
    dx_SH = torch.empty_like(x_SH, memory_format=torch.contiguous_format)
    added = dy_SH if added_SH is None else added_SH
    strides = (each.stride(0) for each in (dy_SH, x_SH, added))
    tensors = dy_SH, x_SH, inv_rms_S1, weight_H, added, dx_SH
    grid, sizes = _whole_rows(x_SH)
    sizes["HAS_ADDED"] = added_SH is not None
    _launch(_rms_norm_gradient, grid, *tensors, *x_SH.shape, *strides, **sizes)
    return dx_SH


def swiglu(x_SH: Tensor, *, out: Tensor) -> None:
    """Write ``silu(gate) * up`` of x = [gate | up], [S, 2 F], into ``out``, [S, F]."""
    grid = len(out), triton.cdiv(out.shape[1], _COLUMNS_AT_A_TIME)
    strides = x_SH.stride(0), out.stride(0)
    _launch(_swiglu, grid, x_SH, out, out.shape[1], *strides, COLUMNS=_COLUMNS_AT_A_TIME)


def swiglu_gradient(dy_SF: Tensor, x_SH: Tensor, *, out: Tensor) -> None:
    """Write the gradient of ``swiglu``'s input, [dgate | dup], into ``out``, [S, 2 F]."""
    grid = len(dy_SF), triton.cdiv(dy_SF.shape[1], _COLUMNS_AT_A_TIME)
    strides = (each.stride(0) for each in (dy_SF, x_SH, out))
    tensors = dy_SF, x_SH, out
    _launch(_swiglu_gradient, grid, *tensors, dy_SF.shape[1], *strides, COLUMNS=_COLUMNS_AT_A_TIME)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    """Write ``[a cos - b sin, b cos + a sin]`` of heads [a, b], [S, G, X, D], into ``out``.

    Args:
        heads: X heads of each of G groups; of any strides but that of the last dimension.
        cos: [S, 1, 1, D], the first half repeated in the second.
        sin: [S, 1, 1, D / 2].
        out: As ``heads``, with strides of its own.
    """
    num_tokens, num_groups, group_heads, head_dim = heads.shape
    num_heads, num_pairs = num_groups * group_heads, head_dim // 2
    strides = *heads.stride()[:3], *out.stride()[:3], cos.stride(0), sin.stride(0)
    counts = num_heads, group_heads, num_pairs
    all_heads, all_pairs = map(triton.next_power_of_2, (num_heads, num_pairs))
    num_warps = min(max(all_heads * all_pairs // 256, 1), 8)
    sizes = {"HEADS": all_heads, "PAIRS": all_pairs, "num_warps": num_warps}
    _launch(_rotate, (num_tokens,), heads, cos, sin, out, *counts, *strides, **sizes)


def softmax_statistics(logits_CV: Tensor, local_C: Tensor) -> Tensor:
    """Return of every row its maximum, ``sum exp(logit - maximum)`` and the label's logit, [3, C].

    Args:
        logits_CV: This rank's columns of the logits.
        local_C: Labels as numbers of these columns, int64; the logit of other labels is 0.
    """
    num_tokens, num_columns = logits_CV.shape
    statistics_3C = logits_CV.new_empty(3, num_tokens, dtype=torch.float32)
    tensors = logits_CV, local_C, statistics_3C
    # Triton's interpreter needs a plain number for the bound of a loop.
    sizes = {"NUM_COLUMNS": num_columns, "COLUMNS": _LOGITS_AT_A_TIME, "num_warps": 8}
    counts = num_tokens, logits_CV.stride(0)
    _launch(_softmax_statistics, (num_tokens,), *tensors, *counts, **sizes)
    return statistics_3C


def softmax_minus_onehot_(logits_CV: Tensor, log_sum_C: Tensor, local_C: Tensor) -> Tensor:
    """Replace logits by ``exp(logit - log_sum)``, less 1 at the label, and return them."""
    num_tokens, num_columns = logits_CV.shape
    grid = num_tokens, triton.cdiv(num_columns, _LOGITS_AT_A_TIME)
    tensors = logits_CV, log_sum_C, local_C
    sizes = {"COLUMNS": _LOGITS_AT_A_TIME, "num_warps": 8}
    _launch(_softmax_minus_onehot, grid, *tensors, num_columns, logits_CV.stride(0), **sizes)
    return logits_CV


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
    """Run a kernel; what its type says of its parameters holds only inside of it."""
    tensors = (each for each in arguments if isinstance(each, Tensor))
    assert all(each.stride(-1) == 1 for each in tensors)  # else it would read other elements
    kernel[grid](*arguments, **sizes)


def _whole_rows(x_SH: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the sizes of programs that have whole rows, several if they are short."""
    num_rows, features = x_SH.shape
    columns = triton.next_power_of_2(features)
    rows = max(1, _ELEMENTS_OF_A_PROGRAM // columns)
    num_warps = min(max(columns * rows // 512, 4), 16)
    sizes = {"ROWS": rows, "COLUMNS": columns, "num_warps": num_warps}
    return (triton.cdiv(num_rows, rows),), sizes


@triton.jit
def _whole_rows_of_a_program(num_rows, features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a program's rows, [ROWS, 1], and columns, [1, COLUMNS], and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    is_row = rows < num_rows
    return rows, columns, is_row, is_row & (columns < features)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x, weight, out, inv_rms,
    num_rows, features, x_stride, out_stride, epsilon,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, is_row, inside = _whole_rows_of_a_program(num_rows, features, ROWS, COLUMNS)
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / features + epsilon)
    tl.store(inv_rms + rows, scale, mask=is_row)
    factor = tl.load(weight + columns, mask=columns < features, other=0.0).to(tl.float32)
    normed = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + rows * out_stride + columns, normed * factor, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_gradient(
    dy, x, inv_rms, weight, added, dx,
    num_rows, features, dy_stride, x_stride, added_stride,
    HAS_ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, is_row, inside = _whole_rows_of_a_program(num_rows, features, ROWS, COLUMNS)
    value = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(inv_rms + rows, mask=is_row, other=0.0)
    factor = tl.load(weight + columns, mask=columns < features, other=0.0).to(tl.float32)
    g = tl.load(dy + rows * dy_stride + columns, mask=inside, other=0.0).to(tl.float32) * factor
    along = tl.sum(g * value, axis=1, keep_dims=True) / features * scale * scale * scale
    result = g * scale - value * along
    if HAS_ADDED:
        more = tl.load(added + rows * added_stride + columns, mask=inside, other=0.0)
        result += more.to(tl.float32)
    tl.store(dx + rows * features + columns, result, mask=inside)


@triton.jit
def _swiglu(x, out, features, x_stride, out_stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + features + columns, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + columns, silu * up, mask=inside)


@triton.jit
def _swiglu_gradient(
    dy, x, out, features, dy_stride, x_stride, out_stride, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < features
    kind = x.dtype.element_ty
    gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + features + columns, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(dy + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = (gate * sigmoid).to(kind).to(tl.float32)
    dsilu = (incoming * up).to(kind).to(tl.float32)
    dgate = dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(out + row * out_stride + columns, dgate, mask=inside)
    tl.store(out + row * out_stride + features + columns, incoming * silu, mask=inside)


@triton.jit
def _rotate(
    heads, cos, sin, out, num_heads, group_heads, num_pairs,
    stride_s, stride_g, stride_x, out_stride_s, out_stride_g, out_stride_x, cos_stride, sin_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    group, member = head // group_heads, head % group_heads
    inside = (head < num_heads) & (pair < num_pairs)
    source = heads + token * stride_s + group * stride_g + member * stride_x + pair
    target = out + token * out_stride_s + group * out_stride_g + member * out_stride_x + pair
    kind = heads.dtype.element_ty
    is_pair = pair < num_pairs
    c = tl.load(cos + token * cos_stride + pair, mask=is_pair, other=0.0).to(tl.float32)
    s = tl.load(sin + token * sin_stride + pair, mask=is_pair, other=0.0).to(tl.float32)
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + num_pairs, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, (a * c).to(kind).to(tl.float32) - b * s, mask=inside)
    tl.store(target + num_pairs, (b * c).to(kind).to(tl.float32) + a * s, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _softmax_statistics(
    logits, labels, statistics, num_rows, stride, NUM_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, COLUMNS)
    # Each lane has a maximum and a sum of its own until the end.
    top = tl.full([COLUMNS], _LEAST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, NUM_COLUMNS, COLUMNS):
        inside = start + columns < NUM_COLUMNS
        value = tl.load(logits + start + columns, mask=inside, other=_LEAST).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    highest = tl.max(top, axis=0)
    tl.store(statistics + row, highest)
    tl.store(statistics + num_rows + row, tl.sum(total * tl.exp(top - highest), axis=0))
    label = tl.load(labels + row)
    is_own = (label >= 0) & (label < NUM_COLUMNS)
    own = tl.load(logits + label, mask=is_own, other=0.0).to(tl.float32)
    tl.store(statistics + 2 * num_rows + row, own)


@triton.jit
def _softmax_minus_onehot(
    logits, log_sums, labels, num_columns, stride, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_columns
    value = tl.load(logits + columns, mask=inside, other=_LEAST).to(tl.float32)
    softmax = tl.exp(value - tl.load(log_sums + row))
    onehot = (columns == tl.load(labels + row)).to(tl.float32)
    tl.store(logits + columns, softmax - onehot, mask=inside)
