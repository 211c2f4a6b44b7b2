"""Loads what is written here, bases and adapters, with Megatron-Bridge itself. Run by hand.

    pip install --target PEERS --no-deps megatron-bridge==0.3.1 megatron-core==0.16.1 \\
        accelerate einops triton hydra-core==1.3.2
    pip install --target PEERS transformers==4.57.6
    PYTHONPATH=PEERS:.:src torchrun --nproc-per-node 2 -m tests.peers.load_in_megatron_bridge

Transformer Engine and the rest of what it wants needs a GPU and is not installed, see
``absent_modules``; one rank is a tensor-parallel size of 1. A later Megatron-Bridge: ``src`` of its
repository and ``megatron/core`` and ``megatron/training`` of Megatron-LM's in one directory.

For every family, tied and not, logits are compared with those of transformers and PEFT: of the
base, and of the base with an adapter in the layout of LoRA and of CanonicalLoRA. At a
tensor-parallel size above 1 CanonicalLoRA is tried without linear_fc1, whose rows Megatron-Bridge
reads in another order than it wrote them at size 1. The other way round, a ``CanonicalLoRA`` that
Megatron-Bridge saved, with all linears, is read here and compared in PEFT.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers
from torch import Tensor

from nemotron.artifacts import Producer
from nemotron.steps._adapter.export import run as export
from nemotron.steps._adapter.schema import ExportConfig
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron_writer import publish_megatron
from tests.peers.families import LLAMA31_ROPE, MODELS, VOCABULARY, make_model
from tests.peers.megatron_bridge import (
    VERSIONS,
    initialize,
    load_adapted,
    load_base,
    logits,
    save_adapted,
)

PRODUCER = Producer(step="test", config_sha256="0" * 64, code_version="0")
Layout = Literal["megatron_bridge", "peft"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = ("LoRA", "CanonicalLoRA")
FUSED = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}
TOLERANCE = 1e-5  # fp32 logits of size about 5, summed in another order


def main() -> None:
    """Write, load, compare; exit 1 if anything differs by more than rounding."""
    tp_size = initialize()
    is_first = torch.distributed.get_rank() == 0
    ids_BS = torch.randint(0, VOCABULARY - 1, (2, 32), generator=torch.Generator().manual_seed(1))
    shared = [tempfile.mkdtemp() if is_first else ""]
    torch.distributed.broadcast_object_list(shared)
    lines, worst = [], 0.0
    for family in MODELS:
        for is_tied in (False, True):
            found = compare(Path(shared[0]) / f"{family}-{is_tied}", family, is_tied, ids_BS)
            worst = max(worst, *found)
            name = f"{family}{', tied' if is_tied else ''}"
            lines.append(f"{name:18}" + "".join(f"{each:15.1e}" for each in found))
    if is_first:
        peers = f"transformers {transformers.__version__}, peft {peft.__version__}"
        print(f"{VERSIONS}, {peers}, torch {torch.__version__}, tensor-parallel size {tp_size}")
        columns = ("base", *KINDS, "its own, read")
        print(" " * 18 + "".join(f"{each:>15}" for each in columns), *lines, sep="\n")
    torch.distributed.barrier()
    os._exit(int(worst > TOLERANCE))  # Megatron-Bridge leaves threads behind


def compare(directory: Path, family: str, is_tied: bool, ids_BS: Tensor) -> list[float]:
    """Return the largest differences of logits: of what it loads, and of what it saves."""
    is_writer = torch.distributed.get_rank() == 0
    changes = {}
    if family == "llama-3.1":  # as Megatron would have it
        changes["rope_parameters"] = {**LLAMA31_ROPE, "original_max_position_embeddings": 8192}
    # The vocabulary is split over the ranks.
    model = make_model(family, tied=is_tied, vocab_size=VOCABULARY - 1, **changes)
    if is_writer:
        save_base(directory, model)
    wanted = {"base": _logits(model, ids_BS)}
    for kind in KINDS:
        adapted = make_adapted(model, kind)
        wanted[kind] = _logits(adapted, ids_BS)
        if is_writer:
            adapted.save_pretrained(str(directory / f"peft-{kind}"))
            _export(directory, f"peft-{kind}", kind, "megatron_bridge")
    torch.distributed.barrier()
    got = {"base": logits(load_base(directory / "base"), ids_BS)}
    got |= {
        kind: logits(load_adapted(directory / "base", directory / kind), ids_BS) for kind in KINDS
    }
    found = [(got[kind] - wanted[kind]).abs().max().item() for kind in wanted]
    of_bridge = logits(save_adapted(directory / "base", directory / "own", dim=4, alpha=6), ids_BS)
    if is_writer:
        _export(directory, "own", "peft-own", "peft")
        adapted = peft.PeftModel.from_pretrained(model, str(directory / "peft-own")).eval()
        found.append((_logits(adapted, ids_BS) - of_bridge).abs().max().item())
    return found


def save_base(directory: Path, model: transformers.PreTrainedModel) -> None:
    """Write a model as transformers does, and as a Megatron checkpoint."""
    hf = directory / "hf"
    model.save_pretrained(hf, max_shard_size="20KB")
    publish_megatron(
        directory / "base",
        HuggingFaceCheckpoint(hf),
        source=hf,
        source_name=str(hf),
        produced_by=PRODUCER,
        inputs=[],
        show_progress=False,
    )


def make_adapted(model: transformers.PreTrainedModel, kind: str) -> peft.PeftModel:
    """Return a model with a random adapter that fits a kind of Megatron-Bridge's."""
    torch.manual_seed(3)
    is_split = kind == "CanonicalLoRA" and torch.distributed.get_world_size() > 1
    targets = [name for name in TARGETS if not (is_split and name in ("gate_proj", "up_proj"))]
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    if kind == "LoRA":
        _share_lora_a(adapted)
    return adapted


def _export(
    directory: Path, source: str, target: str, layout: Literal["megatron_bridge", "peft"]
) -> None:
    export(
        ExportConfig(
            adapter=directory / source,
            output=directory / target,
            base=directory / "base",
            layout=layout,
        ),
        PRODUCER,
    )


@torch.no_grad()
def _logits(model: torch.nn.Module, ids_BS: Tensor) -> Tensor:
    return model(ids_BS).logits


@torch.no_grad()
def _share_lora_a(adapted: torch.nn.Module) -> None:
    """Give the parts of a fused linear one lora_a, as after a training on fused linears."""
    parameters = dict(adapted.named_parameters())
    for name, lora_a in parameters.items():
        for first, others in FUSED.items():
            if f".{first}.lora_A" in name:
                for other in others:
                    parameters[name.replace(first, other)].copy_(lora_a)


if __name__ == "__main__":
    main()
