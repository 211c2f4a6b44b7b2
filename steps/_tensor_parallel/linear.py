"""Column- and row-parallel linears: modules that hold a base shard and LoRA factors.

The modules own shapes, shards, initial values, and what is needed to complete each gradient; the
arithmetic and the collectives are in ``fused``.

S tokens, H input features, F output features, R LoRA rank (``peft.dim``), T tensor-parallel size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_gather, partition
from nemotron.steps._tensor_parallel.dropout import DropoutRows
from nemotron.steps._tensor_parallel.fused import (
    ColumnParallel,
    RowParallel,
)
from nemotron.steps._tensor_parallel.keyed_generator import keyed_generator
from nemotron.steps._tensor_parallel.prologue import Mask, RMSNormPrologue, SwiGLUPrologue

# The LoRA rank is padded with zeros to a multiple of this many elements, so that rows of bf16
# matrices begin at multiples of 16 bytes, as the fast products of a GPU need it.
_ALIGNED = 8


@dataclass(frozen=True)
class LoraSpec:
    """Shape of an adapter: LoRA rank, ``alpha``, dropout in [0, 1), and which scale is used."""

    dim: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The scale of the factors' product: alpha / dim.

        With ``use_rslora`` alpha / sqrt(dim), which keeps the update equally large at every rank.
        Source: Kalajdzievski 2023 (arXiv:2312.03732), theorem 3.2.
        """
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)


@dataclass(frozen=True)
class LoraParameter:
    """One factor of an adapter, and how its gradient is completed.

    ``partial``: replicated, and each rank has computed a part of the gradient's sum.
    ``replicated``: replicated, and every rank has computed the whole gradient. ``sharded``: each
    rank owns a part of the matrix, and has the gradient of that part.
    """

    name: str
    parameter: nn.Parameter
    kind: Literal["partial", "replicated", "sharded"]


class _ParallelLinear(nn.Module, ABC):
    """What both linears share: the extended weight, the factors, scale and dropout mask."""

    def __init__(
        self,
        *,
        name: str,
        weight_shape: tuple[int, int],
        extends_rows: bool,
        lora: LoraSpec | None,
        group: ProcessGroup,
        dtype: torch.dtype,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.lora = lora
        self.sequence_parallel = sequence_parallel and group.size > 1
        out_features, in_features = weight_shape
        lora_dim = lora.dim if lora else 0
        room = -(-lora_dim // _ALIGNED) * _ALIGNED
        self._num_missing = room - lora_dim
        rows, columns = (room, 0) if extends_rows else (0, room)
        self.extended: Tensor
        extended = torch.empty(out_features + rows, in_features + columns, dtype=dtype)
        self.register_buffer("extended", extended)
        # Masters of the factors are fp32 (fp64 in proofs), whatever the base's dtype.
        master_dtype = torch.promote_types(dtype, torch.float32)
        factor = partial(torch.zeros, dtype=master_dtype)
        self.lora_a = nn.Parameter(factor(lora_dim, in_features), requires_grad=lora is not None)
        self.lora_b = nn.Parameter(factor(out_features, lora_dim), requires_grad=lora is not None)

    @property
    def weight(self) -> Tensor:
        """The frozen base shard, a view of the extended matrix: [F / T, H] or [F, H / T]."""
        return self.extended[: len(self.lora_b), : self.lora_a.shape[1]]

    def load_weight(self, shard: Tensor) -> None:
        """Copy this rank's base shard in.

        Raises:
            ValueError: The shape differs from the shard's; names the linear and both shapes.
        """
        _check_shape(f"{self.name}.weight", shard, self.weight)
        self.weight.copy_(shard)

    def load_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> None:
        """Load the whole factors, of which this rank keeps its shard.

        Raises:
            ValueError: A factor does not have its whole shape, as if it were sliced already.
        """
        self._load_factors(*self.shard_lora(lora_a_RH, lora_b_FR))

    @abstractmethod
    def shard_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of what is shaped as the whole factors; raises as load_lora."""

    @abstractmethod
    def gather_lora(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole, [R, H] and [F, R], of what is shaped as this rank's factors."""

    def _load_factors(self, lora_a: Tensor, lora_b: Tensor) -> None:
        for name, source, target in (("a", lora_a, self.lora_a), ("b", lora_b, self.lora_b)):
            _check_shape(f"{self.name}.lora_{name}", source, target)
            with torch.no_grad():
                target.copy_(source)

    def _aligned_factors(self) -> tuple[Tensor, Tensor]:
        """Return both factors, their rank padded with zeros to a multiple of ``_ALIGNED``."""
        if self._num_missing == 0:
            return self.lora_a, self.lora_b
        lora_a_RH = F.pad(self.lora_a, (0, 0, 0, self._num_missing))
        return lora_a_RH, F.pad(self.lora_b, (0, self._num_missing))

    def _scale_and_mask(
        self, dropout: DropoutRows | None, features: int, tokens: slice, columns: slice
    ) -> tuple[float, Mask | None]:
        """Return the scale of the factors' product, and the dropout mask of its input."""
        if self.lora is None or dropout is None or self.lora.dropout == 0.0:
            return self.lora.scale if self.lora else 1.0, None
        p = self.lora.dropout
        return self.lora.scale / (1.0 - p), partial(
            dropout.mask, name=self.name, features=features, tokens=tokens, columns=columns, p=p
        )


class ColumnParallelLinear(_ParallelLinear):
    """A frozen linear with LoRA, split over its output features: [S, H] -> [S, F / T].

    With ``sequence_parallel`` the input is this rank's rows of the sequence: [S / T, H]. The input
    is returned too, as the residual around the block: so the residual's gradient comes back here
    and is added in the same pass as the norm's.

    Args:
        name: Global name, such as ``decoder.layers.0.self_attention.linear_qkv``.
        in_features: H.
        out_features: F, of all ranks together.
        num_segments: Equal parts of the output, each of which is split over the ranks; 2 for the
            gate and up halves of ``linear_fc1``.
        lora: Shape of the adapter; None leaves the base alone.
        group: The tensor-parallel group.
        dtype: dtype of the base weight and of the activations.
        sequence_parallel: Whether activations between the linears are split over the sequence.
        norm_epsilon: If given, the input is RMS-normed first, with ``layer_norm_weight`` [H].

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
        sequence_parallel: bool = False,
        num_segments: int = 1,
        norm_epsilon: float | None = None,
    ) -> None:
        self.segment_features = out_features // num_segments
        self.num_segments = num_segments
        rows = partition(self.segment_features, group, f"{name}: output features")
        super().__init__(
            name=name,
            weight_shape=(num_segments * (rows.stop - rows.start), in_features),
            extends_rows=False,
            lora=lora,
            group=group,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
        )
        self.norm_epsilon = norm_epsilon
        self.layer_norm_weight: Tensor
        self.register_buffer("layer_norm_weight", torch.ones(in_features, dtype=dtype))

    def forward(self, x_SH: Tensor, dropout: DropoutRows | None = None) -> tuple[Tensor, Tensor]:
        """Return the output, [S, F / T], and the input as the residual, shaped as it.

        Args:
            x_SH: [S, H], or [S / T, H] with ``sequence_parallel``.
            dropout: What identifies the rows, while training with LoRA dropout.
        """
        num_tokens, features = x_SH.shape
        epsilon, norm = self.norm_epsilon, None
        if epsilon is not None:
            norm = RMSNormPrologue(self.layer_norm_weight, epsilon)
        first = num_tokens * self.group.rank if self.sequence_parallel else 0
        tokens = slice(first, first + num_tokens)
        scale, mask = self._scale_and_mask(dropout, features, tokens, slice(0, features))
        factors = self._aligned_factors()
        options = scale, norm, mask, self.group, self.sequence_parallel
        return ColumnParallel.apply(x_SH, *factors, self.extended, *options)

    def local_rows(self) -> list[slice]:
        """Return this rank's rows of the whole weight, one slice a segment."""
        part = partition(self.segment_features, self.group, self.name)
        starts = range(0, self.num_segments * self.segment_features, self.segment_features)
        return [slice(start + part.start, start + part.stop) for start in starts]

    def init_lora(self, seed: int) -> None:
        """Set lora_a to the values that ``seed`` and the name ask for at any T, lora_b to zero."""
        lora_a = draw_lora_a(seed, self.name, *self.lora_a.shape)
        self._load_factors(lora_a, torch.zeros_like(self.lora_b))

    def shard_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of what is shaped as the whole factors; raises as load_lora."""
        whole = (self.num_segments * self.segment_features, self.lora_b.shape[1])
        _check_shape(f"{self.name}.lora_b", lora_b_FR, lora_b_FR.new_empty(whole))
        return lora_a_RH, torch.cat([lora_b_FR[rows] for rows in self.local_rows()])

    def gather_lora(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole, [R, H] and [F, R], of what is shaped as this rank's factors."""
        shards = all_gather(lora_b, self.group)
        segments = shards.unflatten(1, (self.num_segments, -1)).transpose(0, 1)
        return lora_a.clone(), segments.reshape(-1, self.lora_b.shape[1])

    def lora_parameters(self) -> Iterator[LoraParameter]:
        """Yield both factors with what completes their gradients."""
        yield LoraParameter(f"{self.name}.lora_a", self.lora_a, "partial")
        yield LoraParameter(f"{self.name}.lora_b", self.lora_b, "sharded")


class RowParallelLinear(_ParallelLinear):
    """A frozen linear with LoRA, split over its input features: [S, H / T] -> [S, F].

    With ``sequence_parallel`` the output is this rank's rows of the sequence: [S / T, F]. With
    ``swiglu`` the input is [gate | up], [S, 2 H / T], and the linear acts on ``silu(gate) * up``.
    A residual given, shaped as the output, is added to it.

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
        sequence_parallel: bool = False,
        swiglu: bool = False,
    ) -> None:
        self.in_features = in_features
        self.activation = SwiGLUPrologue() if swiglu else None
        columns = partition(in_features, group, f"{name}: input features")
        super().__init__(
            name=name,
            weight_shape=(out_features, columns.stop - columns.start),
            extends_rows=True,
            lora=lora,
            group=group,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
        )

    def forward(
        self, x_SH: Tensor, dropout: DropoutRows | None = None, residual_SF: Tensor | None = None
    ) -> Tensor:
        """Return the output plus the residual, [S, F], or [S / T, F] with ``sequence_parallel``.

        Args:
            x_SH: [S, H / T]; [S, 2 H / T] with ``swiglu``.
            dropout: What identifies the rows, while training with LoRA dropout.
            residual_SF: Shaped as the output.
        """
        tokens = slice(0, len(x_SH))
        scale, mask = self._scale_and_mask(dropout, self.in_features, tokens, self.local_columns())
        inputs = x_SH, *self._aligned_factors(), residual_SF
        options = scale, self.activation, mask, self.group, self.sequence_parallel
        return RowParallel.apply(*inputs, self.extended, *options)

    def local_columns(self) -> slice:
        """Return this rank's columns of the whole weight."""
        return partition(self.in_features, self.group, self.name)

    def init_lora(self, seed: int) -> None:
        """Set lora_a to its shard of what ``seed`` and the name ask for, lora_b to zero."""
        lora_a = draw_lora_a(seed, self.name, len(self.lora_a), self.in_features)
        self._load_factors(lora_a[:, self.local_columns()], torch.zeros_like(self.lora_b))

    def shard_lora(self, lora_a_RH: Tensor, lora_b_FR: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of what is shaped as the whole factors; raises as load_lora."""
        whole = (len(self.lora_a), self.in_features)
        _check_shape(f"{self.name}.lora_a", lora_a_RH, lora_a_RH.new_empty(whole))
        return lora_a_RH[:, self.local_columns()], lora_b_FR

    def gather_lora(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole, [R, H] and [F, R], of what is shaped as this rank's factors."""
        shards = all_gather(lora_a, self.group)
        lora_a_RH = shards.transpose(0, 1).reshape(len(self.lora_a), self.in_features)
        return lora_a_RH, lora_b.clone()

    def lora_parameters(self) -> Iterator[LoraParameter]:
        """Yield both factors with what completes their gradients."""
        yield LoraParameter(f"{self.name}.lora_a", self.lora_a, "sharded")
        kind = "partial" if self.sequence_parallel else "replicated"
        yield LoraParameter(f"{self.name}.lora_b", self.lora_b, kind)


def draw_lora_a(seed: int, name: str, lora_dim: int, in_features: int) -> Tensor:
    """Return the initial lora_a, [R, H] fp32, that a seed asks for under a name.

    The whole matrix is drawn on the CPU from a generator keyed by seed and name, so its bits depend
    on no layout, no order of construction and no device. Xavier normal, as Megatron-Bridge's
    default, over the whole fan-in: drawn shard by shard it would grow by sqrt(T).
    """
    generator = keyed_generator(f"{seed}/{name}", torch.device("cpu"))
    std = (2.0 / (in_features + lora_dim)) ** 0.5
    return torch.randn(lora_dim, in_features, generator=generator) * std


def _check_shape(name: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise ValueError(f"{name}: got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}")
