"""Logits of a model that need not fit in memory: one layer at a time is mapped, applied, dropped.

A merge is verified by them. Attention, norms and activations are the trainer's own modules, in
fp32. The weights of the linears stay in the file, in their own type: a few rows at a time are
widened and multiplied while they are in a core's cache.

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
from nemotron.steps._models.attention import PackedDocuments, rotary_tables
from nemotron.steps._models.gpt import Split, TransformerLayer
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from nemotron.steps._tensor_parallel.prologue import Prologue, RMSNormPrologue, rms_norm
from nemotron.steps._training.base_model import load_attention_extras

# Tokens of each document: one document whose only token attends to itself, and two in which
# positions and attention matter. A wrong weight goes unseen only if every input is orthogonal to
# the difference. With 8 tokens and 8 V logits, of which the largest difference counts, that does
# not happen; more tokens would prove no more.
_LENGTHS = (1, 2, 5)
_NUM_COLUMNS = 16  # at least: for fewer columns BLAS takes as long or longer
_ELEMENTS_AT_A_TIME = 1 << 19  # of a weight, widened: 2 MiB, as much as a core's cache holds


@dataclass(frozen=True)
class LogitComparison:
    """Logits of a base with its adapter against those of the merged weights, on fixed tokens.

    Attributes:
        num_tokens: Tokens compared.
        largest_change: Largest change that the adapter makes to a logit of the base.
        largest_difference: Largest difference between base with adapter and merged weights.
        tolerance: Largest difference that rounding the merged weights to their type may cause.
        rounded_difference: If ``largest_difference`` is above ``tolerance``: the largest difference
            between the merged weights and a base to whose weights the adapter is added here, with
            the same rounding. Otherwise None.
    """

    num_tokens: int
    largest_change: float
    largest_difference: float
    tolerance: float
    rounded_difference: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the merged weights compute what base and adapter do, but for their rounding."""
        difference = self.rounded_difference
        return (self.largest_difference if difference is None else difference) <= self.tolerance


def compare_merged(base: Weights, adapter: LoraAdapter, merged: Weights) -> LogitComparison:
    """Return how far merged weights are from their base with its adapter.

    Every tensor of ``merged`` is read once, a tied embedding twice, in a thread of its own.
    """
    # Before the second thread starts: of two threads that call torch's first cosine at the same
    # time, one may get MKL's fast mode, which is off by 1e-4 (seen in 6 of 13,000 processes).
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
            stopped.set()  # an interrupted comparison then waits for one more layer at most
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
    """Tokens, [S] int64, of documents one after the other, and where each document lies."""

    tokens: Tensor
    packed: PackedDocuments

    def twice(self) -> Documents:
        """Return all documents followed by the same documents once more."""
        bounds = self.packed.cu_seqlens
        cos, sin = (table.repeat(2, 1, 1, 1) for table in self.packed.rotary)
        again = [bounds[-1] + bound for bound in bounds[1:]]
        return Documents(self.tokens.repeat(2), PackedDocuments([*bounds, *again], (cos, sin)))


def fixed_documents(weights: Weights) -> Documents:
    """Return the documents that models are compared on; they depend on the vocabulary's size."""
    config = weights.config
    generator = torch.Generator().manual_seed(20)
    tokens_S = torch.randint(0, config.vocab_size, (sum(_LENGTHS),), generator=generator)
    cu_seqlens = [sum(_LENGTHS[:count]) for count in range(len(_LENGTHS) + 1)]
    dtype = _computing_dtype(weights)
    rotary = rotary_tables(config, cu_seqlens, dtype=dtype, device=tokens_S.device)
    return Documents(tokens_S, PackedDocuments(cu_seqlens, rotary))


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
        adapter: If given, there are two rows per token, [2 S, V]: all tokens without the adapter,
            then all with it, so that each weight is widened once for both.
        in_weights: Add the adapter to the weights and round the sum to their type; then there is
            one row per token.
        stopped: Once it is set, this ends with ``CancelledError``.
    """
    config, dtype = weights.config, _computing_dtype(weights)
    if adapter is not None and not in_weights:
        documents = documents.twice()
    hidden_SH = weights.read("model.embed_tokens.weight")[documents.tokens].to(dtype)
    for index in range(config.num_layers):
        if stopped is not None and stopped.is_set():
            raise CancelledError
        layer = _load_layer(weights, index, dtype, adapter, in_weights=in_weights)
        hidden_SH = layer(hidden_SH, documents.packed, None)
        del layer  # before the next one is loaded
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
    """Return how far rounding the weights may move a logit.

    Each weight is off by up to eps / 2 of itself, uniformly distributed. The errors of the 2 L
    branches add up as a random walk, whose length is part of ``spread``; 8 standard deviations of
    the sum are allowed. Adapters that are larger than their base can reach 90 of them; with both
    sums rounded alike 0.4 was the most. The rounding of fp32 itself adds up likewise and comes on
    top: a random adapter with large factors made 1e-5 of the logits' spread with two layers.
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
    # The linears' own weights are dropped before anything is written there: they took no memory.
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
    # One part per segment: gate and up need not be concatenated.
    parts = [read(rows=rows) for rows in linear.local_rows()]
    return _ColumnLinear(norm, parts, factors, in_weights=in_weights)


class _Linear(nn.Module):
    """Computes what a linear of the trainer does, ``W x + B A x``, with W left in its file.

    A and B, if there are any, act on the second half of the tokens only. With ``in_weights`` all
    tokens are multiplied by ``W + B A`` instead, rounded to W's type.
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
    """Return ``x W^T``, [S, F], where ``parts`` are the rows of W, [F, H], in order, of any type.

    With ``added``, the factors A and B, ``W + B A`` rounded to W's type takes the place of W.
    """
    num_rows = max(1, _ELEMENTS_AT_A_TIME // x_SH.shape[1])
    wide = x_SH.new_empty(num_rows, x_SH.shape[1])
    # As W x^T: a CPU computes it faster for so few tokens, and faster yet with x^T contiguous.
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
