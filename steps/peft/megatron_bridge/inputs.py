"""The inputs of a run: verified packs and base, and the model that is loaded from the base."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.artifacts import Artifact, Input, describe_input, read_artifact, verify_files
from nemotron.steps._formats.megatron import MegatronCheckpoint, open_megatron
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.batches import PackedSplit
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.pipeline_schedule import split_layers
from nemotron.steps.peft.megatron_bridge.checks import layout_errors, target_errors
from nemotron.steps.peft.megatron_bridge.settings import ModelSettings, RunSettings


@dataclass(frozen=True)
class Inputs:
    """Packs and base, whose files are as they were written.

    Attributes:
        packed_root: Output directory of data_prep/sft_packing.
        packs: Its manifest.
        base: The Megatron checkpoint.
    """

    packed_root: Path
    packs: Artifact
    base: MegatronCheckpoint

    def split(self, name: str) -> PackedSplit:
        """Return the packed rows of ``train`` or ``valid``."""
        vocab_size = self.base.config.vocab_size
        return PackedSplit(self.packed_root / "splits" / name, vocab_size=vocab_size)

    def lineage(self) -> list[Input]:
        """Return the entries of both in an adapter's manifest."""
        return [
            describe_input("packed_parquet", self.packed_root),
            describe_input("checkpoint_megatron", self.base.root),
        ]

    def properties(self, lora: LoraTargets) -> dict[str, Any]:
        """Return the properties of every adapter that is trained on them."""
        of_base = self.base.artifact.properties if self.base.artifact else {}
        return {
            "base_fingerprint": of_base.get("base_fingerprint"),
            "tokenizer_blake3": self.packs.properties["tokenizer_blake3"],
            "chat_template_sha256": self.packs.properties["chat_template_sha256"],
            "lora": {
                "dim": lora.spec.dim,
                "alpha": lora.spec.alpha,
                "dropout": lora.spec.dropout,
                "target_modules": sorted(lora.modules),
                "use_rslora": lora.spec.use_rslora,
                "rank_pattern": dict(lora.rank_pattern),
                "alpha_pattern": dict(lora.alpha_pattern),
            },
        }

    def base_source(self) -> str:
        """Return the Hugging Face checkpoint that the base was made from, else the base itself."""
        inputs = self.base.artifact.inputs if self.base.artifact else ()
        paths = (each.path for each in inputs if each.type == "checkpoint_hf")
        return next(paths, str(self.base.root))


def open_inputs(packed_root: Path, base_path: Path, layout: Layout) -> Inputs:
    """Return both inputs, verified by all ranks together.

    Raises:
        NemotronError: ``artifact_damaged``, and what ``open_megatron`` raises.
    """
    packs = _verified(packed_root, "packed_parquet", layout)
    base = open_megatron(base_path)
    if base.artifact is not None:
        _verified(base.root, "checkpoint_megatron", layout)
    return Inputs(packed_root, packs, base)


def _verified(directory: Path, artifact_type: str, layout: Layout) -> Artifact:
    """Return an input's manifest after all ranks have verified its files, each rank a share.

    With a base of some hundred gigabytes on a slow disk, a single rank would keep the others
    waiting for longer than a collective may take.
    """
    artifact = read_artifact(directory, artifact_type)
    share = artifact.files[layout.world.rank :: layout.world.size]
    verify_files(directory, artifact.model_copy(update={"files": share}))
    layout.barrier()
    return artifact


def load_model(base: MegatronCheckpoint, settings: RunSettings, layout: Layout) -> PipelineStage:
    """Return this rank's part of the base, with adapters initialised for the first step.

    Raises:
        NemotronError: ``no_such_module``, ``layout_unsupported``.
    """
    started = time.perf_counter()
    _check_base(base, settings, layout)
    model = _load_layers(base, settings.lora, settings.model, layout)
    for linear in model.adapted_linears():
        linear.init_lora(settings.seed)
    if layout.is_first:
        factors = [p for linear in model.adapted_linears() for p in (linear.lora_a, linear.lora_b)]
        trained = sum(factor.numel() for factor in factors)
        print(
            f"base loaded in {time.perf_counter() - started:.1f} s; {trained:,} adapter parameters "
            f"on this rank in {', '.join(sorted(settings.lora.modules))}",
            flush=True,
        )
    return model


def _check_base(base: MegatronCheckpoint, settings: RunSettings, layout: Layout) -> None:
    """Refuse settings that do not fit the base; earlier checks may not have known its config."""
    lora, model = settings.lora, settings.model
    patterns = {
        "peft.target_modules": lora.modules,
        "peft.rank_pattern": lora.rank_pattern,
        "peft.alpha_pattern": lora.alpha_pattern,
    }
    errors = target_errors(patterns, num_layers=base.config.num_layers) + layout_errors(
        num_layers=base.config.num_layers,
        num_query_groups=base.config.num_query_groups,
        ffn_hidden_size=base.config.ffn_hidden_size,
        tensor_parallel_size=layout.tensor.size,
        num_stages=layout.pipeline.size * model.num_chunks,
        num_layers_in_first_stage=model.num_layers_in_first_stage,
        num_layers_in_last_stage=model.num_layers_in_last_stage,
        where=str(base.root),
    )
    if errors:
        raise errors[0]


def _load_layers(
    base: MegatronCheckpoint, lora: LoraTargets, settings: ModelSettings, layout: Layout
) -> PipelineStage:
    """Return this rank's layers, in as many parts as the settings say, with adapters of zeros."""
    layers = split_layers(
        base.config.num_layers,
        layout.pipeline.size * settings.num_chunks,
        first=settings.num_layers_in_first_stage,
        last=settings.num_layers_in_last_stage,
    )
    chunks = [
        load_base_model(
            base,
            lora=lora,
            group=layout.tensor,
            dtype=settings.dtype,
            device=layout.device,
            sequence_parallel=settings.sequence_parallel,
            recompute=settings.recompute,
            layers=part,
        )
        for part in layers[layout.pipeline.rank :: layout.pipeline.size]
    ]
    return PipelineStage(chunks, group=layout.pipeline, device=layout.device)
