"""Small random Llamas made and saved by transformers, and adapters for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.config import DecoderConfig

SaveLlama = Callable[..., LlamaForCausalLM]
SHAPES = {  # [R, in features], [out features, R] of the model that save_llama makes
    "self_attention.linear_qkv": (16, 32),
    "self_attention.linear_proj": (16, 16),
    "mlp.linear_fc1": (16, 48),
    "mlp.linear_fc2": (24, 16),
}


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


@pytest.fixture
def config(tmp_path: Path, save_llama: SaveLlama) -> DecoderConfig:
    """Return the config of a random Llama, which is saved in ``hf``."""
    save_llama(tmp_path / "hf")
    return HuggingFaceCheckpoint(tmp_path / "hf").config


@pytest.fixture
def adapter(tmp_path: Path, config: DecoderConfig) -> Path:
    """Return a random adapter of its attention."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    write_adapter(
        directory,
        random_factors("self_attention.linear_qkv", "self_attention.linear_proj"),
        config=config,
        dim=3,
        alpha=6,
        dropout=0.1,
        base_model_name_or_path="base",
    )
    return directory


def random_factors(*targets: str, lora_rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of some linears, or of all, of what ``save_llama`` makes."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"decoder.layers.{layer}.{name}": (
            torch.randn(lora_rank, SHAPES[name][0], generator=generator),
            torch.randn(SHAPES[name][1], lora_rank, generator=generator),
        )
        for layer in range(2)
        for name in targets or SHAPES
    }


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
