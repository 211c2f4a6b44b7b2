"""A case that every side reads: a random Llama, an adapter with lora_b != 0, and micro batches."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import LORA_TARGETS, weight_rules
from nemotron.steps._training.batches import PackedRow, PackedSplit, collate


@dataclass(frozen=True)
class Shape:
    """Sizes of a case's Llama and of its adapter, which is on all seven projections."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    dim: int


def write_case(
    directory: Path,
    shape: Shape,
    micro_batches: list[dict[str, Any]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Write ``model/``, ``adapter/`` and ``case.json``; the same bytes at every call.

    The model is drawn on ``device`` and written as ``dtype``.
    """
    torch.manual_seed(0)
    sizes = asdict(shape)
    dim = sizes.pop("dim")
    hf_config = LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=8192)
    hf_config.dtype = dtype
    with torch.device(device):
        LlamaForCausalLM._from_config(hf_config).save_pretrained(directory / "model")
    values = json.loads((directory / "model" / "config.json").read_text(encoding="utf-8"))
    config = DecoderConfig.from_hf(values)
    adapter = directory / "adapter"
    adapter.mkdir()
    write_adapter(
        adapter,
        _factors(config, dim),
        config=config,
        dim=dim,
        alpha=2.0 * dim,
        dropout=0.0,
        base_model_name_or_path="model",
    )
    case = {"dim": dim, "alpha": 2.0 * dim, "lr": 1e-4, "micro_batches": micro_batches}
    (directory / "case.json").write_text(json.dumps(case), encoding="utf-8")


def unmasked(num_documents: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Return one micro batch of random documents of one length, all of whose tokens are trained."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_documents, length + 1)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    return [
        {
            "tokens": ids[:, :-1].flatten().tolist(),
            "labels": ids[:, 1:].flatten().tolist(),
            "cu_seqlens": list(range(0, num_documents * length + 1, length)),
        }
    ]


def packed_documents(rows: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Return micro batches of one row each, of random documents, all of whose tokens are trained.

    Documents have 64 to 1,024 tokens; the last one of a row ends it.
    """
    generator = torch.Generator().manual_seed(1)
    micro_batches = []
    for _ in range(rows):
        bounds = [0]
        while bounds[-1] < length:
            size = int(torch.randint(64, 1025, (), generator=generator))
            bounds.append(min(bounds[-1] + size, length))
        ids = torch.randint(0, vocab_size, (2, length), generator=generator)
        micro_batches.append(
            {"tokens": ids[0].tolist(), "labels": ids[1].tolist(), "cu_seqlens": bounds}
        )
    return micro_batches


def packed_chats(chats: Path, *, pack_size: int, rows: int, scratch: Path) -> list[dict[str, Any]]:
    """Return the first packed rows of a chat file as micro batches of one row.

    Packed by the project's own step, with the tokenizer and the template of the tiny model.
    """
    packs = scratch / "packs"
    command = [sys.executable, "-m", "nemotron", "steps", "run", "data_prep/sft_packing"]
    command += ["-c", "tiny", f"blend_path={chats.resolve()}", f"pack_size={pack_size}"]
    subprocess.run([*command, f"output_dir={packs}"], check=True, cwd=scratch, capture_output=True)
    split = PackedSplit(packs / "splits" / "train", vocab_size=1 << 31)
    return [_of_row(split[index]) for index in range(min(rows, len(split)))]


def _of_row(row: PackedRow) -> dict[str, Any]:
    micro = collate([row])
    labels = torch.full((len(micro.tokens),), -1)
    labels[micro.supervised] = micro.labels
    return {
        "tokens": micro.tokens.tolist(),
        "labels": labels.tolist(),
        "cu_seqlens": list(micro.cu_seqlens),
    }


def _factors(config: DecoderConfig, dim: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random factors of every linear of every layer; lora_b is not zero."""
    factors = {}
    for rule in weight_rules(config):
        parent, _, target = rule.megatron.removesuffix(".weight").rpartition(".")
        for layer in range(config.num_layers if target in LORA_TARGETS else 0):
            out_features, in_features = rule.shape
            name = f"{parent.replace('layers', f'layers.{layer}')}.{target}"
            lora_a, lora_b = torch.randn(dim, in_features), torch.randn(out_features, dim)
            factors[name] = 0.02 * lora_a, 0.02 * lora_b
    return factors
