"""Small random Llamas made and saved by transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._models.config import DecoderConfig

SaveLlama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def save_llama() -> SaveLlama:
    """Return a function that saves a random Llama in a directory and returns it."""

    def save(
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
        torch.nn.Module.to(model, dtype)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        return model

    return save


def save_peft_adapter(directory: Path, config: DecoderConfig, *, ranks: Mapping[int, int]) -> None:
    """Write an adapter of ones in PEFT's layout on some layers' linear_fc2, by layer its rank."""
    directory.mkdir()
    factors = {
        f"decoder.layers.{layer}.mlp.linear_fc2": (torch.ones(rank, 24), torch.ones(16, rank))
        for layer, rank in ranks.items()
    }
    write_adapter(
        directory,
        factors,
        config=config,
        dim=3,
        alpha=6,
        dropout=0.0,
        base_model_name_or_path="x",
    )
