"""The decoder in plain torch, in Megatron's names: frozen base, optional LoRA, packed rows.

Activations are [S, H]: the tokens of a micro batch in one dimension, one document after another,
with ``cu_seqlens`` as the documents' boundaries. Documents never attend to each other, and
positions restart in each.

S tokens, H hidden, N attention heads, G key/value heads, D head dimension, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron.steps._models.attention import (
    HeadNorms,
    PackedDocuments,
    packed_attention,
    rotary_tables,
    rotated_heads,
)
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.sliding_window import windowed_attention
from nemotron.steps._models.targets import first_match
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.dropout import DropoutRows
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
)
from nemotron.steps._tensor_parallel.prologue import RMSNormPrologue, rms_norm
from nemotron.steps._tensor_parallel.vocabulary import (
    VocabParallelEmbedding,
    gather_sequence,
    linear_cross_entropy,
    vocabulary_rows,
)


class Split(TypedDict):
    """How every part of the model is split; keyword arguments of the parts' constructors."""

    group: ProcessGroup
    dtype: torch.dtype
    sequence_parallel: bool


@dataclass(frozen=True)
class LoraTargets:
    """Which linears get an adapter, by patterns on Megatron's names, and the adapters' shapes.

    ``rank_pattern`` and ``alpha_pattern`` replace the dim and alpha of ``spec`` in the linears that
    a pattern names; the first pattern that matches counts.
    """

    modules: Collection[str]
    spec: LoraSpec
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def of(self, linear: str) -> LoraSpec | None:
        """Return the adapter's spec for a linear, given by its full name; None if it gets none."""
        if first_match(self.modules, linear) is None:
            return None
        rank, alpha = (
            first_match(each, linear) for each in (self.rank_pattern, self.alpha_pattern)
        )
        return replace(
            self.spec,
            dim=self.spec.dim if rank is None else self.rank_pattern[rank],
            alpha=self.spec.alpha if alpha is None else self.alpha_pattern[alpha],
        )


class GPTModel(nn.Module):
    """A Llama-family decoder whose base is frozen.

    Args:
        config: Shape of the model.
        lora: Adapters; None for the base alone.
        group: The tensor-parallel group.
        dtype: dtype of base weights and activations; the adapters' masters are fp32.
        sequence_parallel: Split activations between the linears over the sequence, [S / T, H]; S is
            padded to a multiple of T.
        recompute: Keep only each layer's input and compute the layer again in the backward pass.
        layers: Numbers of the layers that exist here, all by default. With the first comes the
            embedding, with the last the final norm and the output layer.

    Raises:
        ValueError: Heads, groups or features are not divisible by T.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        lora: LoraTargets | None,
        group: ProcessGroup,
        dtype: torch.dtype,
        sequence_parallel: bool = False,
        recompute: bool = False,
        layers: range | None = None,
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.layer_numbers = layers
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.num_layers
        self.config, self.lora = config, lora
        self.dtype = dtype
        self.group = group
        self.sequence_parallel = sequence_parallel and group.size > 1
        split = Split(group=group, dtype=dtype, sequence_parallel=self.sequence_parallel)
        self.recompute = recompute
        vocabulary = config.vocab_size, config.hidden_size
        self.word_embeddings = (
            VocabParallelEmbedding(*vocabulary, **split) if self.is_first else None
        )
        self.layers = nn.ModuleList(
            TransformerLayer(index, config, lora, split) for index in layers
        )
        self.final_layernorm: Tensor
        self.register_buffer("final_layernorm", torch.ones(config.hidden_size, dtype=dtype))
        # The base is frozen: if a tied output layer is on another stage, it can be a copy.
        tied = config.share_embeddings_and_output_weights and self.is_first
        rows = vocabulary_rows(config.vocab_size, group)
        shape = (rows.stop - rows.start, config.hidden_size)
        has_weight = self.is_last and not tied
        self.output_layer: Tensor | None
        self.register_buffer(
            "output_layer", torch.empty(shape, dtype=dtype) if has_weight else None
        )

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [V / T, H]; the embedding's if it is tied."""
        if self.output_layer is not None:
            return self.output_layer
        assert self.word_embeddings is not None  # only the last layers have an output layer
        return self.word_embeddings.weight

    def rows_per_rank(self, num_tokens: int) -> int:
        """Return the rows that a rank has of activations between layers: S, or S / T rounded up."""
        return -(-num_tokens // self.group.size) if self.sequence_parallel else num_tokens

    def forward(
        self,
        tokens_S: Tensor,
        cu_seqlens: Sequence[int],
        dropout: DropoutRows | None = None,
        received_SH: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states, [S, H], replicated over the tensor-parallel group.

        Without the last layer: the activations that the next layer gets, [S, H] or [S / T, H].

        Args:
            tokens_S: Token ids, int64.
            cu_seqlens: Boundaries of the documents, from 0 to S.
            dropout: The identity of the rows, while training with LoRA dropout.
            received_SH: Output of the layer before this part's; None if this part has the first.
        """
        num_tokens = len(tokens_S)
        if self.sequence_parallel:
            tokens_S, cu_seqlens, dropout = self._pad(tokens_S, cu_seqlens, dropout)
        rotary = rotary_tables(self.config, cu_seqlens, dtype=self.dtype, device=tokens_S.device)
        documents = PackedDocuments(cu_seqlens, rotary)
        x_SH = received_SH if self.word_embeddings is None else self.word_embeddings(tokens_S)
        assert x_SH is not None  # layers that are not the first get what the ones before send
        for layer in self.layers:
            inputs = (x_SH, documents, dropout)
            recompute = self.recompute and torch.is_grad_enabled()
            x_SH = _recomputed(layer, *inputs) if recompute else layer(*inputs)
        if not self.is_last:
            return x_SH
        x_SH = rms_norm(x_SH, self.final_layernorm, self.config.layernorm_epsilon)
        if not self.sequence_parallel:
            return x_SH
        whole_SH = gather_sequence(x_SH, self.group)
        # The gradient of a slice is a copy even if nothing was cut off.
        return whole_SH if len(whole_SH) == num_tokens else whole_SH[:num_tokens]

    def loss(self, hidden_SH: Tensor, labels_S: Tensor) -> Tensor:
        """Return the cross entropy of every token given, [S] fp32."""
        return linear_cross_entropy(
            hidden_SH,
            self.output_weight,
            labels_S,
            vocab_size=self.config.vocab_size,
            group=self.group,
        )

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Return this rank's columns of the logits, [S, V / T]."""
        return hidden_SH @ self.output_weight.T

    def linears(self) -> Iterator[ColumnParallelLinear | RowParallelLinear]:
        """Yield every parallel linear, layer by layer."""
        for module in self.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                yield module

    def adapted_linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Return the linears that carry an adapter."""
        return [linear for linear in self.linears() if linear.lora is not None]

    def _pad(
        self, tokens_S: Tensor, cu_seqlens: Sequence[int], dropout: DropoutRows | None
    ) -> tuple[Tensor, Sequence[int], DropoutRows | None]:
        """Return the micro batch with a last document of padding that makes S a multiple of T."""
        num_missing = -len(tokens_S) % self.group.size
        if num_missing == 0:
            return tokens_S, cu_seqlens, dropout
        if dropout is not None:
            num_tokens = [*dropout.num_tokens, num_missing]
            dropout = DropoutRows(keys=[*dropout.keys, "padding"], num_tokens=num_tokens)
        padded = F.pad(tokens_S, (0, num_missing))
        return padded, [*cu_seqlens, len(padded)], dropout


# Reentrant checkpointing would lose the gradients of adapters on a frozen base. The states of
# random generators need not be kept: only dropout is random, and it is drawn from keys.
_recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class TransformerLayer(nn.Module):
    """One decoder layer: attention and MLP, each on the normed residual; [S, H] -> [S, H].

    As in Megatron the norms belong to ``linear_qkv`` and ``linear_fc1``.

    Under sequence parallelism [S / T, H] -> [S / T, H]: only attention and MLP see the sequence.
    """

    def __init__(
        self,
        index: int,
        config: DecoderConfig,
        lora: LoraTargets | None,
        split: Split,
    ) -> None:
        super().__init__()
        prefix = f"decoder.layers.{index}"
        self.self_attention = SelfAttention(f"{prefix}.self_attention", config, lora, split)
        self.mlp = MLP(f"{prefix}.mlp", config, lora, split)

    def forward(
        self,
        x_SH: Tensor,
        documents: PackedDocuments,
        dropout: DropoutRows | None,
    ) -> Tensor:
        x_SH = self.self_attention(x_SH, documents, dropout)
        return self.mlp(x_SH, dropout)


class SelfAttention(nn.Module):
    """The residual plus grouped-query attention with rotary positions, split by KV group.

    linear_qkv's rows are Megatron's: for every KV group its query heads, then its key, its value.
    Its bias (Qwen2) has this rank's rows; the norms of queries and keys (Qwen3) are one head's.
    """

    qkv_bias: Tensor | None
    q_layernorm: Tensor | None
    k_layernorm: Tensor | None

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        lora: LoraTargets | None,
        split: Split,
    ) -> None:
        super().__init__()
        groups, size = config.num_query_groups, split["group"].size
        if groups % size:
            raise ValueError(
                f"{name}: num_query_groups {groups} is not divisible by "
                f"tensor_model_parallel_size {size}"
            )
        self.head_dim = config.kv_channels
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        attention_features = config.num_attention_heads * config.kv_channels
        qkv_features = attention_features + 2 * config.num_query_groups * config.kv_channels
        self.linear_qkv = ColumnParallelLinear(
            f"{name}.linear_qkv",
            config.hidden_size,
            qkv_features,
            lora=lora and lora.of(f"{name}.linear_qkv"),
            norm_epsilon=config.layernorm_epsilon,
            **split,
        )
        self.linear_proj = RowParallelLinear(
            f"{name}.linear_proj",
            attention_features,
            config.hidden_size,
            lora=lora and lora.of(f"{name}.linear_proj"),
            **split,
        )
        self.attend = packed_attention
        if config.window_size is not None:
            self.attend = partial(windowed_attention, window_size=config.window_size)
        self.norm_epsilon = config.layernorm_epsilon
        ones = partial(torch.ones, dtype=split["dtype"])
        bias = torch.zeros(qkv_features // size, dtype=split["dtype"])
        self.register_buffer("qkv_bias", bias if config.add_qkv_bias else None)
        for norm in ("q_layernorm", "k_layernorm"):
            self.register_buffer(norm, ones(self.head_dim) if config.qk_layernorm else None)

    def forward(
        self,
        x_SH: Tensor,
        documents: PackedDocuments,
        dropout: DropoutRows | None,
    ) -> Tensor:
        heads_per_group = self.queries_per_group + 2
        qkv_SF, residual_SH = self.linear_qkv(x_SH, dropout)
        if self.qkv_bias is not None:
            qkv_SF = qkv_SF + self.qkv_bias
        qkv = qkv_SF.unflatten(1, (-1, heads_per_group, self.head_dim))
        heads = rotated_heads(qkv, documents.rotary, self._head_norms())
        out_SND = self.attend(*heads, documents)
        return self.linear_proj(out_SND.flatten(1, 2), dropout, residual_SF=residual_SH)

    def _head_norms(self) -> HeadNorms | None:
        if self.q_layernorm is None or self.k_layernorm is None:
            return None
        return HeadNorms(
            RMSNormPrologue(self.q_layernorm, self.norm_epsilon),
            RMSNormPrologue(self.k_layernorm, self.norm_epsilon),
        )


class MLP(nn.Module):
    """``x + linear_fc2(silu(gate) * up)``, where linear_fc1's rows are [gate ; up]."""

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        lora: LoraTargets | None,
        split: Split,
    ) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.linear_fc1 = ColumnParallelLinear(
            f"{name}.linear_fc1",
            hidden,
            2 * ffn,
            num_segments=2,
            lora=lora and lora.of(f"{name}.linear_fc1"),
            norm_epsilon=config.layernorm_epsilon,
            **split,
        )
        self.linear_fc2 = RowParallelLinear(
            f"{name}.linear_fc2",
            ffn,
            hidden,
            lora=lora and lora.of(f"{name}.linear_fc2"),
            swiglu=True,
            **split,
        )

    def forward(self, x_SH: Tensor, dropout: DropoutRows | None) -> Tensor:
        fc1_SF, residual_SH = self.linear_fc1(x_SH, dropout)
        return self.linear_fc2(fc1_SF, dropout, residual_SF=residual_SH)
