"""What happens to a linear's input inside of the linear: RMS norm or SwiGLU, never saved.

A prologue is computed in the linear's forward pass and again in its backward pass, so that the
normed input and the SwiGLU product, two of the largest activations of a layer, are held by nobody.

S tokens, H features of the input; all of it is per token, so it works alike on this rank's rows of
the sequence and on its shard of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Returns the dropout mask of an input: 0 where it is dropped, else 1.
Mask = Callable[[Tensor], Tensor]


class Prologue(Protocol):
    """An elementwise (or per-token) function with its own backward."""

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        """Write the output; return what, beside ``x_SH``, is kept for the backward pass."""
        ...

    def product(
        self, left_SR: Tensor, x_SH: Tensor, kept: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``left^T (output * mask)``, [R, H], and what of it ``gradient`` can use."""
        ...

    def gradient(
        self,
        dy_SH: Tensor,
        x_SH: Tensor,
        kept: Tensor,
        part: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the input for ``dy_SH``, that of the output.

        ``part`` is what ``product`` returned, or None where nobody called it; ``added_SH`` is a
        gradient of the input from elsewhere, to be added. ``dy_SH`` and ``part`` are destroyed.
        """
        ...


@dataclass(frozen=True)
class RMSNormPrologue:
    """``weight * x / rms(x)``, in fp32, with a frozen weight [H]; keeps 1 / rms(x), [S, 1].

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4.
    """

    weight: Tensor
    epsilon: float

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        wide_SH = _widened(x_SH)
        norm_S1 = torch.linalg.vector_norm(wide_SH, dim=1, keepdim=True)
        scale_S1 = torch.rsqrt(norm_S1.square() / x_SH.shape[1] + self.epsilon)
        torch.mul(wide_SH, scale_S1, out=out).mul_(self.weight)
        return scale_S1

    def product(
        self, left_SR: Tensor, x_SH: Tensor, kept: Tensor, mask: Mask | None
    ) -> tuple[Tensor, None]:
        # Rows and columns are scaled where there are R of them, and the output is not computed.
        scaled_SR = (left_SR * kept).to(x_SH.dtype)
        return _widened(scaled_SR.T @ dropped(x_SH, mask)) * self.weight, None

    def gradient(
        self,
        dy_SH: Tensor,
        x_SH: Tensor,
        kept: Tensor,
        part: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        # With r = 1 / rms(x) and g = w dy: dx = r g - x r^3 mean(g x).
        g_SH = _widened(dy_SH).mul_(self.weight)
        mean_S1 = torch.linalg.vecdot(g_SH, _widened(x_SH)).div_(x_SH.shape[1]).unsqueeze(1)
        along_x_S1 = mean_S1.mul_(kept.pow(3))
        if added_SH is None:
            dx_SH = g_SH.mul_(kept).addcmul_(x_SH, along_x_S1, value=-1.0)
        else:
            dx_SH = torch.addcmul(added_SH, x_SH, along_x_S1, value=-1.0).addcmul_(g_SH, kept)
        return dx_SH.to(x_SH.dtype)


@dataclass(frozen=True)
class SwiGLUPrologue:
    """``silu(gate) * up`` of an input [gate | up]; keeps nothing.

    Source: Shazeer 2020 (arXiv:2002.05202), section 2.
    """

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        torch.ops.aten.silu.out(gate_SF, out=out).mul_(up_SF)
        return x_SH.new_empty(0)

    def product(
        self, left_SR: Tensor, x_SH: Tensor, kept: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        computed_SH = x_SH.new_empty(x_SH.shape)  # where the gradient will be
        silu_SF, product_SF = computed_SH.chunk(2, dim=1)
        torch.ops.aten.silu.out(gate_SF, out=silu_SF)
        torch.mul(silu_SF, up_SF, out=product_SF)
        return left_SR.T @ dropped(product_SF, mask), computed_SH

    def gradient(
        self,
        dy_SH: Tensor,
        x_SH: Tensor,
        kept: Tensor,
        part: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        dx_SH = x_SH.new_empty(x_SH.shape) if part is None else part
        dgate_SF, dup_SF = dx_SH.chunk(2, dim=1)
        if part is None:
            torch.ops.aten.silu.out(gate_SF, out=dgate_SF)
        torch.mul(dy_SH, dgate_SF, out=dup_SF)  # where silu(gate) still is
        torch.ops.aten.silu_backward.grad_input(dy_SH.mul_(up_SF), gate_SF, grad_input=dgate_SF)
        return dx_SH if added_SH is None else dx_SH.add_(added_SH)


def rms_norm(x_SH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm of a tensor that no linear follows; saves x and 1 / rms(x) only."""
    return _RMSNorm.apply(x_SH, RMSNormPrologue(weight_H, epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, norm: RMSNormPrologue) -> Tensor:
        y_SH = torch.empty_like(x_SH)
        kept = norm.apply(x_SH, out=y_SH)
        ctx.save_for_backward(x_SH, kept)
        ctx.norm = norm
        return y_SH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x_SH, kept = ctx.saved_tensors
        return ctx.norm.gradient(grad_outputs[0].clone(), x_SH, kept), None


def dropped(x_SH: Tensor, mask: Mask | None) -> Tensor:
    """Return ``x * mask``; x itself without dropout."""
    return x_SH if mask is None else x_SH * mask(x_SH)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
