"""Column- and row-parallel linears: frozen base plus LoRA, with one collective each.

The base weight and ``lora_a`` lie in one extended matrix ``[W ; A]``, so that one GEMM gives the
base output and the rank-R activations ``h``. Base shard and LoRA shard are added locally; then one
collective: the column-parallel input gradient in the backward pass, the row-parallel output, with
``h`` riding along as R extra columns, in the forward pass.

S tokens, H input features, F output features, R LoRA rank (``peft.dim``), T tensor-parallel size;
``scale = alpha / R``.

Source: LoRA, Hu et al. 2021 (arXiv:2106.09685), equation 3; tensor parallelism, Shoeybi et al. 2019
(arXiv:1909.08053), section 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_gather,
    all_reduce,
    all_reduce_async,
    partition,
)
from nemotron.steps._tensor_parallel.dropout import DropoutRows

Mask = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapters: LoRA rank, ``alpha`` (scale is alpha / dim), dropout in [0, 1)."""

    dim: int
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class LoraParameter:
    """One factor of one adapter and how its gradient is completed.

    ``partial``: replicated, and each rank holds a part of the gradient's sum. ``replicated``: every
    rank computes the whole gradient. ``sharded``: each rank owns its part of the matrix.
    """

    name: str
    parameter: nn.Parameter
    kind: Literal["partial", "replicated", "sharded"]


class _LoraLinear(torch.autograd.Function):
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

    With dropout, ``x`` of the adapter's lines is ``x * mask``. Saved: x (for dA) and h (for dB);
    masks are drawn again; nothing is saved and nothing computed for a gradient of the frozen base.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        lora_a_RH: Tensor,
        lora_b_FR: Tensor,
        extended: Tensor,
        scale: float,
        mask: Mask | None,
        forward_group: ProcessGroup,
        backward_group: ProcessGroup,
    ) -> Tensor:
        y_ext = all_reduce(_extended_gemm(x_SH, lora_a_RH, extended, mask), forward_group)
        y_SF, h_SR = y_ext.split([len(lora_b_FR), len(lora_a_RH)], dim=1)
        y_SF.addmm_(h_SR, lora_b_FR.to(x_SH.dtype).T, alpha=scale)
        ctx.save_for_backward(x_SH, h_SR.contiguous(), lora_b_FR)
        ctx.extended, ctx.scale, ctx.mask, ctx.group = extended, scale, mask, backward_group
        return y_SF

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy_SF,) = grad_outputs
        x_SH, h_SR, lora_b_FR = ctx.saved_tensors
        needs_dx, needs_adapter = ctx.needs_input_grad[:2]
        dh_SR = (dy_SF @ lora_b_FR.to(dy_SF.dtype)).mul_(ctx.scale)
        dx_SH = da_RH = db_FR = wait = None
        if needs_dx:
            dx_SH = _input_gradient(dy_SF, dh_SR, ctx.extended, ctx.mask)
            wait = all_reduce_async(dx_SH, ctx.group)
        if needs_adapter:
            dropped_SH = x_SH if ctx.mask is None else x_SH * ctx.mask(x_SH)
            da_RH = (dh_SR.T @ dropped_SH).to(lora_b_FR.dtype)
            db_FR = (dy_SF.T @ h_SR).mul_(ctx.scale).to(lora_b_FR.dtype)
        if wait is not None:
            wait()
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


def _input_gradient(dy_SF: Tensor, dh_SR: Tensor, extended: Tensor, mask: Mask | None) -> Tensor:
    weight_FH, lora_a_RH = extended.split([dy_SF.shape[1], dh_SR.shape[1]])
    dx_SH = dy_SF @ weight_FH
    if mask is None:
        return dx_SH.addmm_(dh_SR, lora_a_RH)
    return dx_SH.addcmul_(dh_SR @ lora_a_RH, mask(dx_SH))


class _ParallelLinear(nn.Module):
    """What both linears share: the extended weight, the factors, and the call of the core."""

    def __init__(
        self,
        *,
        name: str,
        weight_shape: tuple[int, int],
        lora: LoraSpec | None,
        group: ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.lora = lora
        out_features, in_features = weight_shape
        lora_dim = lora.dim if lora else 0
        self.extended: Tensor
        self.register_buffer(
            "extended", torch.empty(out_features + lora_dim, in_features, dtype=dtype)
        )
        # Masters of the factors are fp32 (fp64 for a proof) whatever the base's dtype is.
        master_dtype = torch.promote_types(dtype, torch.float32)
        factor = partial(torch.zeros, dtype=master_dtype)
        self.lora_a = nn.Parameter(factor(lora_dim, in_features), requires_grad=lora is not None)
        self.lora_b = nn.Parameter(factor(out_features, lora_dim), requires_grad=lora is not None)

    @property
    def weight(self) -> Tensor:
        """The frozen base shard, a view of the extended matrix: [F / T, H] or [F, H / T]."""
        return self.extended[: len(self.lora_b)]

    def load_weight(self, shard: Tensor) -> None:
        """Copy this rank's base shard in.

        Raises:
            ValueError: The shape differs from the shard's; names the linear and both shapes.
        """
        _check_shape(f"{self.name}.weight", shard, self.weight)
        self.weight.copy_(shard)

    def _load_factors(self, lora_a: Tensor, lora_b: Tensor) -> None:
        for name, source, target in (("a", lora_a, self.lora_a), ("b", lora_b, self.lora_b)):
            _check_shape(f"{self.name}.lora_{name}", source, target)
            with torch.no_grad():
                target.copy_(source)

    def _apply_lora(
        self,
        x: Tensor,
        mask: Mask | None,
        forward_group: ProcessGroup,
        backward_group: ProcessGroup,
    ) -> Tensor:
        scale = self.lora.alpha / self.lora.dim if self.lora else 1.0
        return _LoraLinear.apply(
            x, self.lora_a, self.lora_b, self.extended, scale, mask, forward_group, backward_group
        )

    def _mask(self, dropout: DropoutRows | None, features: int, columns: slice) -> Mask | None:
        if dropout is None or self.lora is None or self.lora.dropout == 0.0:
            return None
        p = self.lora.dropout
        return partial(dropout.mask, name=self.name, features=features, columns=columns, p=p)


class ColumnParallelLinear(_ParallelLinear):
    """A frozen linear with LoRA, split over its output features: [S, H] -> [S, F / T].

    Args:
        name: Global name, such as ``decoder.layers.0.self_attention.linear_qkv``.
        in_features: H.
        out_features: F, of all ranks together.
        num_segments: Equal parts of the output that are each split over the ranks, such as 2 for
            the gate and up halves of ``linear_fc1``.
        lora: Shape of the adapter; None leaves the base alone.
        group: The tensor-parallel group.
        dtype: dtype of the base weight and of the activations.

    Raises:
        ValueError: The output features of a segment are not divisible by T.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        lora: LoraSpec | None,
        group: ProcessGroup,
        dtype: torch.dtype,
        num_segments: int = 1,
    ) -> None:
        self.segment_features = out_features // num_segments
        self.num_segments = num_segments
        rows = partition(self.segment_features, group, f"{name}: output features")
        shape = (num_segments * (rows.stop - rows.start), in_features)
        super().__init__(name=name, weight_shape=shape, lora=lora, group=group, dtype=dtype)

    def forward(self, x_SH: Tensor, dropout: DropoutRows | None = None) -> Tensor:
        features = x_SH.shape[1]
        mask = self._mask(dropout, features, slice(0, features))
        return self._apply_lora(x_SH, mask, ProcessGroup(), self.group)

    def local_rows(self) -> list[slice]:
        """Return this rank's rows of the whole weight, one slice a segment."""
        part = partition(self.segment_features, self.group, self.name)
        starts = range(0, self.num_segments * self.segment_features, self.segment_features)
        return [slice(start + part.start, start + part.stop) for start in starts]

    def init_lora(self, seed: int) -> None:
        """Set lora_a to the values that ``seed`` and the name ask for at any T, lora_b to zero."""
        lora_a = draw_lora_a(seed, self.name, *self.lora_a.shape)
        self._load_factors(lora_a, torch.zeros_like(self.lora_b))

    def load_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> None:
        """Load the whole factors, of which this rank keeps its shard.

        Raises:
            ValueError: A factor does not have its whole shape; a pre-sliced one is refused too.
        """
        whole = (self.num_segments * self.segment_features, self.lora_b.shape[1])
        _check_shape(f"{self.name}.lora_b", lora_b_FR, lora_b_FR.new_empty(whole))
        self._load_factors(lora_a_RH, torch.cat([lora_b_FR[rows] for rows in self.local_rows()]))

    def full_lora(self) -> tuple[Tensor, Tensor]:
        """Return the whole factors, [R, H] and [F, R], on every rank."""
        shards = all_gather(self.lora_b.detach(), self.group)
        segments = shards.unflatten(1, (self.num_segments, -1)).transpose(0, 1)
        return self.lora_a.detach().clone(), segments.reshape(-1, self.lora_b.shape[1])

    def lora_parameters(self) -> Iterator[LoraParameter]:
        """Yield both factors with what completes their gradients."""
        yield LoraParameter(f"{self.name}.lora_a", self.lora_a, "partial")
        yield LoraParameter(f"{self.name}.lora_b", self.lora_b, "sharded")


class RowParallelLinear(_ParallelLinear):
    """A frozen linear with LoRA, split over its input features: [S, H / T] -> [S, F].

    Args and errors as of ``ColumnParallelLinear``, with the input features divisible by T.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        lora: LoraSpec | None,
        group: ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        self.in_features = in_features
        columns = partition(in_features, group, f"{name}: input features")
        shape = (out_features, columns.stop - columns.start)
        super().__init__(name=name, weight_shape=shape, lora=lora, group=group, dtype=dtype)

    def forward(self, x_SH: Tensor, dropout: DropoutRows | None = None) -> Tensor:
        mask = self._mask(dropout, self.in_features, self.local_columns())
        return self._apply_lora(x_SH, mask, self.group, ProcessGroup())

    def local_columns(self) -> slice:
        """Return this rank's columns of the whole weight."""
        return partition(self.in_features, self.group, self.name)

    def init_lora(self, seed: int) -> None:
        """Set lora_a to its shard of what ``seed`` and the name ask for, lora_b to zero."""
        lora_a = draw_lora_a(seed, self.name, len(self.lora_a), self.in_features)
        self._load_factors(lora_a[:, self.local_columns()], torch.zeros_like(self.lora_b))

    def load_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> None:
        """Load the whole factors, of which this rank keeps its shard; as for the column."""
        whole = (len(self.lora_a), self.in_features)
        _check_shape(f"{self.name}.lora_a", lora_a_RH, lora_a_RH.new_empty(whole))
        self._load_factors(lora_a_RH[:, self.local_columns()], lora_b_FR)

    def full_lora(self) -> tuple[Tensor, Tensor]:
        """Return the whole factors, [R, H] and [F, R], on every rank."""
        shards = all_gather(self.lora_a.detach(), self.group)
        lora_a = shards.transpose(0, 1).reshape(len(self.lora_a), self.in_features)
        return lora_a, self.lora_b.detach().clone()

    def lora_parameters(self) -> Iterator[LoraParameter]:
        """Yield both factors with what completes their gradients."""
        yield LoraParameter(f"{self.name}.lora_a", self.lora_a, "sharded")
        yield LoraParameter(f"{self.name}.lora_b", self.lora_b, "replicated")


def draw_lora_a(seed: int, name: str, lora_dim: int, in_features: int) -> Tensor:
    """Return the initial lora_a, [R, H] fp32, that a seed asks for under a name.

    The whole matrix is drawn on the CPU from a generator keyed by seed and name, so its bits depend
    on no layout, no order of construction and no device. Xavier normal, as Megatron-Bridge's
    default, over the whole fan-in: drawn shard by shard it would grow by sqrt(T).
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    std = (2.0 / (in_features + lora_dim)) ** 0.5
    return torch.randn(lora_dim, in_features, generator=generator) * std


def _check_shape(name: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise ValueError(f"{name}: got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
