"""Prologues: what a linear does to its input before the product, RMS norm or SwiGLU.

A prologue is computed in the linear's forward pass and again in its backward pass, so that nothing
has to hold the normed input and the SwiGLU product, two of the largest activations of a layer.

S tokens, H features of the input, F of the output: H is F, or 2 F for SwiGLU. Prologues work token
by token, so they are the same on this rank's rows of the sequence and on its shard of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.kernels import kernels_for

# Returns the dropout mask of an input: 0 where it is dropped, else 1.
Mask = Callable[[Tensor], Tensor]


class Prologue(Protocol):
    """An elementwise (or per-token) function with its own backward."""

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        """Write the output, [S, F], into ``out``; return a statistic that the other methods need.

        The norm's statistic is 1 / rms(x), [S, 1]; SwiGLU has none, [0].
        """
        ...

    def lora_a_gradient(
        self, dh_SR: Tensor, x_SH: Tensor, statistic: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``dh^T (output * mask)``, [R, F], and what ``gradient`` can reuse of its work.

        For the norm that is None; for SwiGLU [silu(gate) | output], [S, 2 F], on a GPU only the
        second half.
        """
        ...

    def gradient(
        self,
        dy_SF: Tensor,
        x_SH: Tensor,
        statistic: Tensor,
        recomputed: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        """Return the gradient of the input, [S, H], for ``dy_SF``, that of the output.

        Args:
            dy_SF: Gradient of the output; overwritten.
            x_SH: The input.
            statistic: The result of ``apply``.
            recomputed: The second result of ``lora_a_gradient``, overwritten; None if that was not
                called.
            added_SH: Another gradient of the input, to be added.
        """
        ...


@dataclass(frozen=True)
class RMSNormPrologue:
    """``weight * x / rms(x)``, in fp32, with a frozen weight [H]; its statistic is 1 / rms(x).

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4.
    """

    weight: Tensor
    epsilon: float

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        if kernels := kernels_for(x_SH):
            return kernels.rms_norm(x_SH, self.weight, self.epsilon, out=out)
        wide_SH = _widened(x_SH)
        norm_S1 = torch.linalg.vector_norm(wide_SH, dim=1, keepdim=True)
        scale_S1 = torch.rsqrt(norm_S1.square() / x_SH.shape[1] + self.epsilon)
        torch.mul(wide_SH, scale_S1, out=out).mul_(self.weight)
        return scale_S1

    def lora_a_gradient(
        self, dh_SR: Tensor, x_SH: Tensor, statistic: Tensor, mask: Mask | None
    ) -> tuple[Tensor, None]:
        # The norm's factors are applied to [S, R] and [R, H], so the output is never computed.
        scaled_SR = (dh_SR * statistic).to(x_SH.dtype)
        return _widened(scaled_SR.T @ dropped(x_SH, mask)) * self.weight, None

    def gradient(
        self,
        dy_SF: Tensor,
        x_SH: Tensor,
        statistic: Tensor,
        recomputed: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        if kernels := kernels_for(x_SH):
            return kernels.rms_norm_gradient(dy_SF, x_SH, statistic, self.weight, added_SH)
        # With r = 1 / rms(x) and g = w dy: dx = r g - x r^3 mean(g x).
        g_SH = _widened(dy_SF).mul_(self.weight)
        mean_S1 = torch.linalg.vecdot(g_SH, _widened(x_SH)).div_(x_SH.shape[1]).unsqueeze(1)
        along_x_S1 = mean_S1.mul_(statistic.pow(3))
        if added_SH is None:
            dx_SH = g_SH.mul_(statistic).addcmul_(x_SH, along_x_S1, value=-1.0)
        else:
            dx_SH = torch.addcmul(added_SH, x_SH, along_x_S1, value=-1.0).addcmul_(g_SH, statistic)
        return dx_SH.to(x_SH.dtype)


@dataclass(frozen=True)
class SwiGLUPrologue:
    """``silu(gate) * up`` of an input [gate | up]; it has no statistic.

    Source: Shazeer 2020 (arXiv:2002.05202), section 2.
    """

    def apply(self, x_SH: Tensor, *, out: Tensor) -> Tensor:
        if kernels := kernels_for(x_SH):
            kernels.swiglu(x_SH, out=out)
        else:
            gate_SF, up_SF = x_SH.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_SF, out=out).mul_(up_SF)
        return x_SH.new_empty(0)

    def lora_a_gradient(
        self, dh_SR: Tensor, x_SH: Tensor, statistic: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        recomputed_SH = x_SH.new_empty(x_SH.shape)  # where the gradient will be
        silu_SF, product_SF = recomputed_SH.chunk(2, dim=1)
        if kernels := kernels_for(x_SH):
            kernels.swiglu(x_SH, out=product_SF)
        else:
            gate_SF, up_SF = x_SH.chunk(2, dim=1)
            torch.ops.aten.silu.out(gate_SF, out=silu_SF)
            torch.mul(silu_SF, up_SF, out=product_SF)
        return dh_SR.T @ dropped(product_SF, mask), recomputed_SH

    def gradient(
        self,
        dy_SF: Tensor,
        x_SH: Tensor,
        statistic: Tensor,
        recomputed: Tensor | None = None,
        added_SH: Tensor | None = None,
    ) -> Tensor:
        dx_SH = x_SH.new_empty(x_SH.shape) if recomputed is None else recomputed
        if kernels := kernels_for(x_SH):
            kernels.swiglu_gradient(dy_SF, x_SH, out=dx_SH)
        else:
            gate_SF, up_SF = x_SH.chunk(2, dim=1)
            dgate_SF, dup_SF = dx_SH.chunk(2, dim=1)
            if recomputed is None:
                torch.ops.aten.silu.out(gate_SF, out=dgate_SF)
            torch.mul(dy_SF, dgate_SF, out=dup_SF)  # where silu(gate) still is
            dsilu_SF = dy_SF.mul_(up_SF)
            torch.ops.aten.silu_backward.grad_input(dsilu_SF, gate_SF, grad_input=dgate_SF)
        return dx_SH if added_SH is None else dx_SH.add_(added_SH)


def rms_norm(x_SH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm of a tensor, for a norm without a linear; saves only x and 1 / rms(x)."""
    return _RMSNorm.apply(x_SH, RMSNormPrologue(weight_H, epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, norm: RMSNormPrologue) -> Tensor:
        y_SH = torch.empty_like(x_SH)
        inv_rms = norm.apply(x_SH, out=y_SH)
        ctx.save_for_backward(x_SH, inv_rms)
        ctx.norm = norm
        return y_SH

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        x_SH, inv_rms = ctx.saved_tensors
        return ctx.norm.gradient(grad_outputs[0].clone(), x_SH, inv_rms), None


def dropped(x_SH: Tensor, mask: Mask | None) -> Tensor:
    """Return ``x * mask``; x itself without dropout."""
    return x_SH if mask is None else x_SH * mask(x_SH)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
