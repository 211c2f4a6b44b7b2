"""A small random base with a tokenizer, and an adapter for it as the trainer would save it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemotron.artifacts import Producer, publish, write_artifact
from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint, tokenizer_blake3
from nemotron.steps._formats.megatron_writer import publish_megatron

PRODUCER = Producer(step="test", config_sha256="0" * 64, code_version="0")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
SaveBase = Callable[..., LlamaForCausalLM]
SaveAdapter = Callable[..., Path]


@pytest.fixture
def save_base() -> SaveBase:
    """Return a function that saves a random base with tokenizer and chat template."""

    def save(
        directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> LlamaForCausalLM:
        torch.manual_seed(seed)
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
        model.save_pretrained(directory, max_shard_size="4KB")
        words = Tokenizer(WordLevel({"a": 1, "b": 2}))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
        return model

    return save


@pytest.fixture
def base_hf(tmp_path: Path, save_base: SaveBase) -> Path:
    """Return a Hugging Face base in shards, with grouped queries, not tied."""
    save_base(tmp_path / "base_hf")
    return tmp_path / "base_hf"


@pytest.fixture
def base_megatron(tmp_path: Path, base_hf: Path) -> Path:
    """Return ``base_hf`` as a Megatron checkpoint."""
    publish_megatron(
        tmp_path / "base_megatron",
        HuggingFaceCheckpoint(base_hf),
        source=base_hf,
        source_name="test",
        produced_by=PRODUCER,
        inputs=[],
    )
    return tmp_path / "base_megatron"


def random_factors(ranks: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of all linears of both layers, of which each has its own rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "self_attention.linear_qkv": (16, 32),
        "self_attention.linear_proj": (16, 16),
        "mlp.linear_fc1": (16, 48),
        "mlp.linear_fc2": (24, 16),
    }
    return {
        f"decoder.layers.{layer}.{name}": (
            0.2 * torch.randn(rank, columns, generator=generator),
            0.2 * torch.randn(rows, rank, generator=generator),
        )
        for layer, rank in enumerate(ranks)
        for name, (columns, rows) in shapes.items()
    }


@pytest.fixture
def save_adapter() -> SaveAdapter:
    """Return a function that saves a random adapter for a base, recorded as the trainer does."""

    def save(
        directory: Path,
        base_hf: Path,
        *,
        dim: int = 3,
        alpha: float = 6.0,
        use_rslora: bool = False,
        ranks: tuple[int, int] = (3, 3),
        alphas: dict[str, float] | None = None,
        **properties: Any,
    ) -> Path:
        base = HuggingFaceCheckpoint(base_hf)
        with publish(directory, step="test") as partial:
            write_adapter(
                partial,
                random_factors(ranks),
                config=base.config,
                dim=dim,
                alpha=alpha,
                dropout=0.0,
                base_model_name_or_path=str(base_hf),
                use_rslora=use_rslora,
                alphas=alphas,
            )
            recorded = {
                "base_fingerprint": base_fingerprint(base),
                "tokenizer_blake3": tokenizer_blake3(base_hf),
                "chat_template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
                "iteration": 20,
                "valid_loss": 1.5,
                "valid_loss_before": 2.5,
            }
            write_artifact(
                partial,
                artifact_type="checkpoint_lora",
                produced_by=PRODUCER,
                properties=recorded | properties,
            )
        return directory

    return save


@pytest.fixture
def adapter(tmp_path: Path, base_hf: Path, save_adapter: SaveAdapter) -> Path:
    """Return the output root of a training of ``base_hf`` whose latest save is iteration 20."""
    root = tmp_path / "run"
    save_adapter(root / "iter_0000020", base_hf)
    (root / "latest_checkpointed_iteration.txt").write_text("20", encoding="utf-8")
    return root
