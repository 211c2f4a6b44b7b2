"""Small random Llamas made and saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
