"""The frozen base: each rank reads its own slices of the checkpoint, and nothing else."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets, SelfAttention, TransformerLayer
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import ColumnParallelLinear
from nemotron.steps._tensor_parallel.vocabulary import vocabulary_rows


class WeightReader(Protocol):
    """The source of a base model: whole or sliced tensors under Megatron's names on disk."""

    @property
    def config(self) -> DecoderConfig:
        """Shape of the model."""
        ...

    def read(
        self,
        name: str,
        *,
        layer: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """Return one tensor, or the slice asked for."""
        ...


def load_base_model(
    reader: WeightReader,
    *,
    lora: LoraTargets | None,
    group: ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: bool = False,
    layers: range | None = None,
) -> GPTModel:
    """Return the model of a checkpoint on ``device``, this rank's shards loaded, adapters zero.

    With ``layers`` only those layers are built and read; the embedding comes with the first layer,
    the final norm and the output layer with the last.

    Raises:
        ValueError: A dimension is not divisible by the size of ``group``.
    """
    with torch.device(device):
        model = GPTModel(
            reader.config,
            lora=lora,
            group=group,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
            layers=layers,
        )
    load_weights(model, reader)
    return model


def load_weights(model: GPTModel, reader: WeightReader) -> None:
    """Replace all frozen weights of a model by this rank's shards of those of ``reader``."""
    _load_ends(model, reader)
    for index, layer in zip(model.layer_numbers, model.layers, strict=True):
        assert isinstance(layer, TransformerLayer)
        _load_layer(layer, index, reader)


def _load_ends(model: GPTModel, reader: WeightReader) -> None:
    rows = vocabulary_rows(model.config.vocab_size, model.group)
    embedding = "embedding.word_embeddings.weight"
    if model.word_embeddings is not None:
        model.word_embeddings.weight.copy_(reader.read(embedding, rows=rows))
    if model.output_layer is not None:
        is_tied = model.config.share_embeddings_and_output_weights
        name = embedding if is_tied else "output_layer.weight"
        model.output_layer.copy_(reader.read(name, rows=rows))
    if model.is_last:
        model.final_layernorm.copy_(reader.read("decoder.final_layernorm.weight"))


def _load_layer(layer: TransformerLayer, index: int, reader: WeightReader) -> None:
    attention, mlp = layer.self_attention, layer.mlp
    linears = {
        "self_attention.linear_qkv": attention.linear_qkv,
        "self_attention.linear_proj": attention.linear_proj,
        "mlp.linear_fc1": mlp.linear_fc1,
        "mlp.linear_fc2": mlp.linear_fc2,
    }
    for name, linear in linears.items():
        on_disk = f"decoder.layers.{name}.weight"
        if isinstance(linear, ColumnParallelLinear):
            norm = reader.read(f"decoder.layers.{name}.layer_norm_weight", layer=index)
            linear.layer_norm_weight.copy_(norm)
            first = 0
            for rows in linear.local_rows():
                part = reader.read(on_disk, layer=index, rows=rows)
                linear.weight[first : first + len(part)].copy_(part)
                first += len(part)
        else:
            columns = linear.local_columns()
            linear.load_weight(reader.read(on_disk, layer=index, columns=columns))
    load_attention_extras(attention, index, reader)


def load_attention_extras(attention: SelfAttention, index: int, reader: WeightReader) -> None:
    """Load what only some families have: a bias on q, k and v, or norms of queries and keys."""
    on_disk = "decoder.layers.self_attention"
    if attention.qkv_bias is not None:
        (rows,) = attention.linear_qkv.local_rows()
        bias = reader.read(f"{on_disk}.linear_qkv.bias", layer=index, rows=rows)
        attention.qkv_bias.copy_(bias)
    for name in ("q_layernorm", "k_layernorm"):
        norm: Tensor | None = getattr(attention, name)
        if norm is not None:
            norm.copy_(reader.read(f"{on_disk}.{name}.weight", layer=index))
