"""Logits of a model that need not fit in memory: one layer at a time is mapped, applied, forgotten.

What a merge is proved with. Attention, norms and activations are the trainer's own modules, in
fp32. The weights of its linears stay in their own type, where they lie: each is widened a few rows
at a time, in a core's cache, where they are multiplied at once.

S tokens, H input features, F output features, R LoRA rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from threading import Event

import torch
from torch import Tensor, nn

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.lora import LoraAdapter, fused_factors
from nemotron.steps._formats.weight_files import one_torch_thread
from nemotron.steps._formats.weights import Weights
from nemotron.steps._models.attention import PackedDocuments, Rotary, rotary_tables
from nemotron.steps._models.gpt import Split, TransformerLayer
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from nemotron.steps._tensor_parallel.prologue import Prologue, RMSNormPrologue, rms_norm
from nemotron.steps._training.base_model import load_attention_extras

# Of the documents, tokens: one whose only token attends to itself, and two in which positions and
# attention matter. A difference in a weight goes unseen only where all inputs are orthogonal to it:
# after 8 of them, and 8 V logits of which the largest difference counts, more prove no more.
_LENGTHS = (1, 2, 5)
_NUM_COLUMNS = 16  # at least: BLAS takes as long, or longer, for fewer
_ELEMENTS_AT_A_TIME = 1 << 19  # of a weight, widened: 2 MiB, as much as a core's cache holds


@dataclass(frozen=True)
class LogitComparison:
    """Logits of a base with its adapter against those of the merged weights, on fixed tokens.

    Attributes:
        num_tokens: Tokens compared.
        largest_change: Largest difference that the adapter makes to the base's logits.
        largest_difference: Largest difference between base with adapter and merged.
        tolerance: What rounding the merged weights to their type is expected to make of it at most.
        rounded_difference: Where it is more, the largest difference between merged and a base to
            whose fused weights the adapter is added here, rounded to their type; else None.
    """

    num_tokens: int
    largest_change: float
    largest_difference: float
    tolerance: float
    rounded_difference: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the merged weights do what base and adapter do, as far as their type allows."""
        difference = self.rounded_difference
        return (self.largest_difference if difference is None else difference) <= self.tolerance


def compare_merged(base: Weights, adapter: LoraAdapter, merged: Weights) -> LogitComparison:
    """Return how far merged weights are from their base with its adapter.

    Every tensor of ``merged`` is read once, a tied embedding twice, in a thread of its own.
    """
    # Before there are two threads: of two that ask torch for their first cosine at the same time,
    # one may get it in fast mode, off by 1e-4 (MKL's vector functions; 6 of 13,000 processes).
    documents = fixed_documents(base)
    stopped = Event()
    follow = partial(logits, merged, documents, stopped=stopped)
    with one_torch_thread(), ThreadPoolExecutor(1) as thread:
        # Settings of torch are the caller's, whichever way torch keeps them.
        of_merged = thread.submit(copy_context().run, follow)
        try:
            without, wanted = logits(base, documents, adapter=adapter).chunk(2)
            got = of_merged.result()
        finally:
            stopped.set()  # whoever is told to stop waits for one more layer at most
    eps = torch.finfo(base.dtype("model.layers.0.mlp.down_proj.weight")).eps
    spread = wanted.std().item() * math.sqrt(2.0 * base.config.num_layers)
    difference, tolerance = _largest(wanted - got), _tolerance(spread, eps)
    rounded_difference = None
    if not difference <= tolerance:  # NaN too
        rounded = logits(base, documents, adapter=adapter, in_weights=True)
        rounded_difference = _largest(rounded - got)
    return LogitComparison(
        num_tokens=len(got),
        largest_change=_largest(wanted - without),
        largest_difference=difference,
        tolerance=tolerance,
        rounded_difference=rounded_difference,
    )


@dataclass(frozen=True)
class Documents:
    """Tokens, [S] int64, of documents one after the other, and the angles of their positions."""

    tokens: Tensor
    cu_seqlens: list[int]
    rotary: Rotary

    def twice(self) -> Documents:
        """Return all documents and, after them, all of them again."""
        end = self.cu_seqlens[-1]
        cos, sin = (table.repeat(2, 1, 1, 1) for table in self.rotary)
        again = [end + bound for bound in self.cu_seqlens[1:]]
        return Documents(self.tokens.repeat(2), self.cu_seqlens + again, (cos, sin))


def fixed_documents(weights: Weights) -> Documents:
    """Return the documents that models are compared on; the same for a vocabulary."""
    config = weights.config
    generator = torch.Generator().manual_seed(20)
    tokens_S = torch.randint(0, config.vocab_size, (sum(_LENGTHS),), generator=generator)
    cu_seqlens = [sum(_LENGTHS[:count]) for count in range(len(_LENGTHS) + 1)]
    dtype = _computing_dtype(weights)
    rotary = rotary_tables(config, cu_seqlens, dtype=dtype, device=tokens_S.device)
    return Documents(tokens_S, cu_seqlens, rotary)


@torch.no_grad()
def logits(
    weights: Weights,
    documents: Documents,
    *,
    adapter: LoraAdapter | None = None,
    in_weights: bool = False,
    stopped: Event | None = None,
) -> Tensor:
    """Return the logits of every token in fp32 (fp64 of weights in fp64), [S, V].

    Args:
        weights: The model; one layer of it is held at a time.
        documents: Of ``fixed_documents``.
        adapter: If given, two rows come for a token: all without it, then all with it, [2 S, V]. So
            each weight is widened once for both.
        in_weights: The adapter is added to the weights, which are rounded to their type, and there
            is one row a token.
        stopped: Ends this with ``CancelledError`` once it is set.
    """
    config, dtype = weights.config, _computing_dtype(weights)
    if adapter is not None and not in_weights:
        documents = documents.twice()
    hidden_SH = weights.read("model.embed_tokens.weight")[documents.tokens].to(dtype)
    packed = PackedDocuments(documents.cu_seqlens, documents.rotary)
    for index in range(config.num_layers):
        if stopped is not None and stopped.is_set():
            raise CancelledError
        layer = _load_layer(weights, index, dtype, adapter, in_weights=in_weights)
        hidden_SH = layer(hidden_SH, packed, None)
        del layer  # before the next one is there
    norm_H = weights.read("model.norm.weight").to(dtype)
    hidden_SH = rms_norm(hidden_SH, norm_H, config.layernorm_epsilon)
    is_tied = config.share_embeddings_and_output_weights
    output_VH = weights.read("model.embed_tokens.weight" if is_tied else "lm_head.weight")
    return _product(hidden_SH, [output_VH])


def _computing_dtype(weights: Weights) -> torch.dtype:
    return torch.promote_types(weights.dtype("model.embed_tokens.weight"), torch.float32)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _tolerance(spread: float, eps: float) -> float:
    """Return how far rounding may move a logit.

    Each weight is off by up to eps / 2 of itself, uniformly; the errors of the 2 L branches add up
    as a random walk, which is in ``spread``; 8 of its standard deviations. Adapters larger than
    their base can make up to 90 of it; where the sums are rounded alike, 0.4. On top the rounding
    of fp32, which adds up likewise: a random adapter of large factors made 1e-5 of the logits'
    spread with two layers.
    """
    return spread * (8.0 * eps / math.sqrt(12.0) + 2e-5)


def _load_layer(
    weights: Weights,
    index: int,
    dtype: torch.dtype,
    adapter: LoraAdapter | None,
    *,
    in_weights: bool,
) -> TransformerLayer:
    """Return one of the trainer's layers, its linears on the weights where they lie."""
    reader = AsMegatron(weights)
    split = Split(group=ProcessGroup(), dtype=dtype, sequence_parallel=False)
    layer = TransformerLayer(index, weights.config, None, split)
    load_attention_extras(layer.self_attention, index, reader)
    # Its linears' own weights go before anything is written there, and have taken no memory.
    factors = fused_factors(adapter, index) if adapter is not None else {}
    for block in (layer.self_attention, layer.mlp):
        for name, linear in list(block.named_children()):
            assert isinstance(linear, ColumnParallelLinear | RowParallelLinear)
            own = factors.get(linear.name)
            in_place = _in_place(linear, reader, index, dtype, own, in_weights=in_weights)
            setattr(block, name, in_place)
    return layer


def _in_place(
    linear: ColumnParallelLinear | RowParallelLinear,
    reader: AsMegatron,
    layer: int,
    dtype: torch.dtype,
    factors: tuple[Tensor, Tensor] | None,
    *,
    in_weights: bool,
) -> _ColumnLinear | _RowLinear:
    """Return what stands in for a linear of the trainer, on the weights where they lie."""
    on_disk = linear.name.replace(f"layers.{layer}.", "layers.")
    read = partial(reader.read, f"{on_disk}.weight", layer=layer)
    factors = factors and (factors[0].to(dtype), factors[1].to(dtype))
    if isinstance(linear, RowParallelLinear):
        return _RowLinear(linear.activation, [read()], factors, in_weights=in_weights)
    assert linear.norm_epsilon is not None
    norm_H = reader.read(f"{on_disk}.layer_norm_weight", layer=layer).to(dtype)
    norm = RMSNormPrologue(norm_H, linear.norm_epsilon)
    # Segments apart: gate and up need not be put together.
    parts = [read(rows=rows) for rows in linear.local_rows()]
    return _ColumnLinear(norm, parts, factors, in_weights=in_weights)


class _Linear(nn.Module):
    """What a linear of the trainer computes, ``W x + B A x``, with W where it lies.

    A and B, where there are any, act on the second half of the tokens; or ``in_weights``, where
    ``W + B A`` is rounded to W's type.
    """

    def __init__(
        self,
        prologue: Prologue | None,
        parts: Sequence[Tensor],
        factors: tuple[Tensor, Tensor] | None,
        *,
        in_weights: bool,
    ) -> None:
        super().__init__()
        self.prologue, self.parts, self.factors = prologue, parts, factors
        self.in_weights = in_weights

    def product(self, x_SH: Tensor) -> Tensor:
        """Return the linear of the prologue's output, [S, F]."""
        input_SH = x_SH
        if self.prologue is not None:
            input_SH = x_SH.new_empty(len(x_SH), self.parts[0].shape[1])
            self.prologue.apply(x_SH, out=input_SH)
        y_SF = _product(input_SH, self.parts, self.factors if self.in_weights else None)
        if self.factors is not None and not self.in_weights:
            lora_a_RH, lora_b_FR = self.factors
            adapted = slice(len(x_SH) // 2, None)
            y_SF[adapted].addmm_(input_SH[adapted] @ lora_a_RH.T, lora_b_FR.T)
        return y_SF


class _ColumnLinear(_Linear):
    """In place of a ``ColumnParallelLinear``."""

    def forward(self, x_SH: Tensor, dropout: None = None) -> tuple[Tensor, Tensor]:
        return self.product(x_SH), x_SH


class _RowLinear(_Linear):
    """In place of a ``RowParallelLinear``."""

    def forward(
        self, x_SH: Tensor, dropout: None = None, residual_SF: Tensor | None = None
    ) -> Tensor:
        y_SF = self.product(x_SH)
        return y_SF if residual_SF is None else y_SF.add_(residual_SF)


def _product(
    x_SH: Tensor, parts: Sequence[Tensor], added: Sequence[Tensor] | None = None
) -> Tensor:
    """Return ``x W^T``, [S, F], of the parts of W, [F, H], one below the other in any type.

    With A and B of ``added`` it is ``W + B A``, rounded to the type of W.
    """
    num_rows = max(1, _ELEMENTS_AT_A_TIME // x_SH.shape[1])
    wide = x_SH.new_empty(num_rows, x_SH.shape[1])
    # As W x^T, which a CPU computes faster for so few tokens, and faster yet with x^T in a piece.
    x_HS = x_SH.new_zeros(x_SH.shape[1], max(len(x_SH), _NUM_COLUMNS))
    x_HS[:, : len(x_SH)] = x_SH.T
    y_FS = x_SH.new_empty(sum(map(len, parts)), x_HS.shape[1])
    stop = 0
    for block in (block for part in parts for block in part.split(num_rows)):
        rows = slice(stop, stop + len(block))
        stop = rows.stop
        wide_rows = wide[: len(block)].copy_(block)
        if added is not None:
            lora_a_RH, lora_b_FR = added
            wide_rows.copy_(wide_rows.addmm_(lora_b_FR[rows], lora_a_RH).to(block.dtype))
        torch.mm(wide_rows, x_HS, out=y_FS[rows])
    return y_FS[:, : len(x_SH)].T.contiguous()
