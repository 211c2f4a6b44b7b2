"""Logits of a model that need not fit in memory: one layer at a time is read, applied, forgotten.

What a merge is proved with. The layers are those that the trainer computes with, in fp32; beside
one layer only the embedding or the output layer is held, in its own type.

S tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.lora import LoraAdapter, fused_factors
from nemotron.steps._formats.weights import Weights
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._tensor_parallel.prologue import rms_norm
from nemotron.steps._training.base_model import load_base_model, load_weights

_LENGTHS = (1, 11, 20)  # of the documents, tokens
_ROWS_AT_A_TIME = 8192  # of the output layer, in fp32
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LogitComparison:
    """Logits of a base with its adapter against those of the merged weights, on fixed tokens.

    Attributes:
        num_tokens: Tokens compared.
        largest_change: Largest difference that the adapter makes to the base's logits.
        largest_difference: Largest difference between base with adapter and merged.
        tolerance: What rounding the merged weights to their type may make of it.
    """

    num_tokens: int
    largest_change: float
    largest_difference: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether the merged weights do what base and adapter do, as far as their type allows."""
        return self.largest_difference <= self.tolerance


def compare_merged(base: Weights, adapter: LoraAdapter, merged: Weights) -> LogitComparison:
    """Return how far merged weights are from their base with its adapter.

    Every tensor of ``merged`` is read once, a tied embedding twice.
    """
    config = base.config
    tokens_S = fixed_tokens(config.vocab_size)
    dtype = torch.promote_types(base.dtype("model.embed_tokens.weight"), torch.float32)
    readers = AsMegatron(base), AsMegatron(merged)
    before, of_merged = (_embed(weights, tokens_S, dtype) for weights in (base, merged))
    both = before
    layers = _LayerByLayer(dtype)
    for layer in range(config.num_layers):
        factors = fused_factors(adapter, layer)
        before = _apply(layers.load(readers[0], layer, factors), tokens_S, before)
        both = _apply(layers.add(layer, factors), tokens_S, both)
        of_merged = _apply(layers.load(readers[1], layer, factors), tokens_S, of_merged)
    del layers
    without, wanted = _logits(base, torch.cat([before, both])).chunk(2)
    got = _logits(merged, of_merged)
    eps = torch.finfo(base.dtype("model.layers.0.mlp.down_proj.weight")).eps
    return LogitComparison(
        num_tokens=len(tokens_S),
        largest_change=(wanted - without).abs().max().item(),
        largest_difference=(wanted - got).abs().max().item(),
        tolerance=_tolerance(eps, wanted.std().item(), num_layers=config.num_layers),
    )


def fixed_tokens(vocab_size: int) -> Tensor:
    """Return the tokens that models are compared on, [S] int64; the same for a vocabulary."""
    generator = torch.Generator().manual_seed(20)
    return torch.randint(0, vocab_size, (sum(_LENGTHS),), generator=generator)


def _tolerance(eps: float, spread: float, *, num_layers: int) -> float:
    """Return how far rounding may move a logit.

    Each weight is off by up to eps / 2 of itself, uniformly; the errors of the 2 L branches add up
    as a random walk; 8 of its standard deviations. On top the rounding of fp32, which adds up
    likewise: a random adapter of large factors made 1e-5 of the logits' spread with two layers.
    """
    return spread * math.sqrt(2.0 * num_layers) * (8.0 * eps / math.sqrt(12.0) + 2e-5)


def _cu_seqlens() -> list[int]:
    return [sum(_LENGTHS[:count]) for count in range(len(_LENGTHS) + 1)]


def _embed(weights: Weights, tokens_S: Tensor, dtype: torch.dtype) -> Tensor:
    return weights.read("model.embed_tokens.weight")[tokens_S].to(dtype)


class _OneLayer:
    """A reader of a model that has one layer of another, as neither its first nor its last."""

    def __init__(self, reader: AsMegatron, layer: int) -> None:
        self.config = replace(reader.config, num_layers=3)
        self._reader, self._layer = reader, layer

    def read(
        self,
        name: str,
        *,
        layer: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        return self._reader.read(name, layer=self._layer, rows=rows, columns=columns)


class _LayerByLayer:
    """One layer of any model at a time, all in the same memory while their adapters are alike."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._ranks: dict[str, int] = {}
        self._model: GPTModel | None = None

    def load(self, reader: AsMegatron, layer: int, factors: Factors) -> GPTModel:
        """Return a model that is one layer, with room for its factors, which add nothing yet."""
        one = _OneLayer(reader, layer)
        ranks = {_inner(name, layer): len(lora_a) for name, (lora_a, _) in factors.items()}
        if self._model is not None and self._ranks == ranks:
            load_weights(self._model, one)
            for linear in self._model.adapted_linears():
                linear.lora_b.detach().zero_()
            return self._model
        self._model = None  # before the next one takes its memory
        lora = LoraTargets(list(ranks), LoraSpec(dim=1, alpha=1.0), ranks, dict(ranks))
        self._ranks, self._model = (
            ranks,
            load_base_model(
                one,
                lora=lora if ranks else None,
                group=ProcessGroup(),
                dtype=self._dtype,
                device=torch.device("cpu"),
                layers=range(1, 2),
            ),
        )
        return self._model

    def add(self, layer: int, factors: Factors) -> GPTModel:
        """Return the layer that was loaded last, with its adapter."""
        assert self._model is not None
        own = {_inner(name, layer): pair for name, pair in factors.items()}
        for linear in self._model.adapted_linears():
            linear.load_lora(*own[linear.name])
        return self._model


def _inner(name: str, layer: int) -> str:
    return name.replace(f"decoder.layers.{layer}.", "decoder.layers.1.", 1)


@torch.no_grad()
def _apply(model: GPTModel, tokens_S: Tensor, hidden_SH: Tensor) -> Tensor:
    return model(tokens_S, _cu_seqlens(), received_SH=hidden_SH)


@torch.no_grad()
def _logits(weights: Weights, hidden_SH: Tensor) -> Tensor:
    """Return the logits of the last layer's output, [S, V]."""
    norm_H = weights.read("model.norm.weight").to(hidden_SH.dtype)
    hidden_SH = rms_norm(hidden_SH, norm_H, weights.config.layernorm_epsilon)
    is_tied = weights.config.share_embeddings_and_output_weights
    output_VH = weights.read("model.embed_tokens.weight" if is_tied else "lm_head.weight")
    blocks = output_VH.split(_ROWS_AT_A_TIME)
    return torch.cat([hidden_SH @ block.to(hidden_SH.dtype).T for block in blocks], dim=1)
