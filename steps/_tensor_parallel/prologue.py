"""What happens to a linear's input inside of the linear: RMS norm or SwiGLU, never saved.

A prologue is computed in the linear's forward pass and again in its backward pass, so that the
normed input and the SwiGLU product, two of the largest activations of a layer, are held by nobody.

S tokens, H features of the input; all of it is per token, so it works alike on this rank's rows of
the sequence and on its shard of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Three or four operands of this size fit into a core's second-level cache of 1 to 2 MiB.
_CACHED_BYTES = 1 << 18


class Prologue(Protocol):
    """An elementwise (or per-token) function with its own backward."""

    def apply(self, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and what, beside ``x_SH``, makes computing it again cheap."""
        ...

    def again(self, x_SH: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output once more, the same bits, and a part of it that ``gradient`` wants."""
        ...

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor, part: Tensor) -> Tensor:
        """Return the gradient of the input for ``dy_SH``, that of the output; may destroy it."""
        ...


@dataclass(frozen=True)
class RMSNormPrologue:
    """``weight * x / rms(x)``, in fp32, with a frozen weight [H]; keeps 1 / rms(x), [S, 1].

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4.
    """

    weight: Tensor
    epsilon: float

    def apply(self, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        wide_SH = _widened(x_SH)
        norm_S1 = torch.linalg.vector_norm(wide_SH, dim=1, keepdim=True)
        scale_S1 = torch.rsqrt(norm_S1.square() / x_SH.shape[1] + self.epsilon)
        return self.again(x_SH, scale_S1)[0], scale_S1

    def again(self, x_SH: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        y_SH = (_widened(x_SH) * kept).to(x_SH.dtype).mul_(self.weight)
        return y_SH, y_SH

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor, part: Tensor) -> Tensor:
        # With y = w x r: dx = r (w dy - x r mean(dy y)).
        wide_SH = _widened(dy_SH)
        mean_S1 = torch.linalg.vecdot(wide_SH, _widened(part)).div_(x_SH.shape[1]).unsqueeze(1)
        dx_SH = (wide_SH * self.weight).addcmul_(x_SH, mean_S1.mul_(kept), value=-1.0)
        return dx_SH.mul_(kept).to(x_SH.dtype)


@dataclass(frozen=True)
class SwiGLUPrologue:
    """``silu(gate) * up`` of an input [gate | up]; keeps nothing.

    Source: Shazeer 2020 (arXiv:2002.05202), section 2.
    """

    def apply(self, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        y_SF = gate_SF.new_empty(gate_SF.shape)
        for rows in row_blocks(gate_SF):
            torch.ops.aten.silu.out(gate_SF[rows], out=y_SF[rows])
            y_SF[rows].mul_(up_SF[rows])
        return y_SF, x_SH.new_empty(0)

    def again(self, x_SH: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        y_SF, silu_SF = (gate_SF.new_empty(gate_SF.shape) for _ in range(2))
        for rows in row_blocks(gate_SF):
            torch.ops.aten.silu.out(gate_SF[rows], out=silu_SF[rows])
            torch.mul(silu_SF[rows], up_SF[rows], out=y_SF[rows])
        return y_SF, silu_SF

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor, part: Tensor) -> Tensor:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        dx_SH = x_SH.new_empty(x_SH.shape)
        dgate_SF, dup_SF = dx_SH.chunk(2, dim=1)
        for rows in row_blocks(dy_SH):
            torch.mul(dy_SH[rows], part[rows], out=dup_SF[rows])
            torch.ops.aten.silu_backward.grad_input(
                dy_SH[rows].mul_(up_SF[rows]), gate_SF[rows], grad_input=dgate_SF[rows]
            )
        return dx_SH


def rms_norm(x_SH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm of a tensor that no linear follows; saves x and 1 / rms(x) only."""
    return _RMSNorm.apply(x_SH, RMSNormPrologue(weight_H, epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, norm: RMSNormPrologue) -> Tensor:
        y_SH, kept = norm.apply(x_SH)
        ctx.save_for_backward(x_SH, kept)
        ctx.norm = norm
        return y_SH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x_SH, kept = ctx.saved_tensors
        part = ctx.norm.again(x_SH, kept)[1]
        return ctx.norm.gradient(grad_outputs[0], x_SH, kept, part), None


def row_blocks(tensor_SF: Tensor) -> list[slice]:
    """Return rows to work on at a time, so that several passes find them in a core's cache.

    All of them on a GPU, where every pass is a launch.
    """
    num_rows = len(tensor_SF)
    at_once = num_rows if tensor_SF.is_cuda else max(1, _CACHED_BYTES // tensor_SF[:1].nbytes)
    return [slice(start, start + at_once) for start in range(0, num_rows, max(1, at_once))]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
