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
import torch.nn.functional as F
from torch import Tensor


class Prologue(Protocol):
    """An elementwise (or per-token) function with its own backward."""

    def apply(self, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and what, beside ``x_SH``, makes computing it again cheap."""
        ...

    def again(self, x_SH: Tensor, kept: Tensor) -> Tensor:
        """Return the output once more, the same bits."""
        ...

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor) -> Tensor:
        """Return the gradient of the input for ``dy_SH``, that of the output."""
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
        scale_S1 = torch.rsqrt(wide_SH.square().mean(dim=1, keepdim=True) + self.epsilon)
        return self.weight * (wide_SH * scale_S1).to(x_SH.dtype), scale_S1

    def again(self, x_SH: Tensor, kept: Tensor) -> Tensor:
        return self.weight * (_widened(x_SH) * kept).to(x_SH.dtype)

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor) -> Tensor:
        normed_SH = _widened(x_SH) * kept
        weighted_SH = _widened(dy_SH) * self.weight
        mean_S1 = (weighted_SH * normed_SH).mean(dim=1, keepdim=True)
        dx_SH = weighted_SH.sub_(normed_SH.mul_(mean_S1)).mul_(kept)
        return dx_SH.to(x_SH.dtype)


@dataclass(frozen=True)
class SwiGLUPrologue:
    """``silu(gate) * up`` of an input [gate | up]; keeps nothing.

    Source: Shazeer 2020 (arXiv:2002.05202), section 2.
    """

    def apply(self, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        nothing = x_SH.new_empty(0)
        return self.again(x_SH, nothing), nothing

    def again(self, x_SH: Tensor, kept: Tensor) -> Tensor:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        return F.silu(gate_SF).mul_(up_SF)

    def gradient(self, dy_SH: Tensor, x_SH: Tensor, kept: Tensor) -> Tensor:
        gate_SF, up_SF = x_SH.chunk(2, dim=1)
        sigmoid_SF = torch.sigmoid(gate_SF)
        silu_SF = gate_SF * sigmoid_SF
        slope_SF = sigmoid_SF + silu_SF * (1.0 - sigmoid_SF)
        return torch.cat([slope_SF.mul_(up_SF).mul_(dy_SH), silu_SF.mul_(dy_SH)], dim=1)


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
        return ctx.norm.gradient(grad_outputs[0], *ctx.saved_tensors), None


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
