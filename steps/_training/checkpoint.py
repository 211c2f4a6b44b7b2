"""Saves: one ``iter_NNNNNNN`` directory per save, each an adapter that PEFT loads as it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron.artifacts import Input, Producer, publish, write_artifact, write_text
from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._formats.huggingface import CHAT_TEMPLATE, TOKENIZER_FILES, copy_files
from nemotron.steps._training.distributed import Layout, gather_tensors
from nemotron.steps._training.pipeline import PipelineStage

TRACKER = "latest_checkpointed_iteration.txt"


def start_directory(directory: Path) -> Path | None:
    """Make an empty directory for a run; return where the earlier run that was there went, if any.

    An earlier run is kept beside it, as ``NAME.previous``: what it took hours to train is not
    overwritten by a rerun. One is kept.
    """
    previous = None
    if directory.exists() and any(directory.iterdir()):
        previous = directory.with_name(f"{directory.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    directory.mkdir(parents=True, exist_ok=True)
    return previous


def save_adapter(
    directory: Path,
    model: PipelineStage,
    *,
    layout: Layout,
    iteration: int,
    base_model_name_or_path: str,
    tokenizer_dir: Path | None,
    packed_root: Path,
    produced_by: Producer,
    inputs: Sequence[Input],
    properties: dict[str, Any],
) -> Path:
    """Write the adapter of an iteration; a collective of the ranks, of which the first writes.

    The base's tokenizer and the chat template of the packs lie beside it, since an adapter served
    with another template answers other questions than it was trained on.

    Returns:
        The ``iter_NNNNNNN`` directory, complete on every rank's return.
    """
    target = directory / f"iter_{iteration:07d}"
    whole = {linear.name: linear.full_lora() for linear in model.adapted_linears()}
    stages = layout.pipeline, layout.device
    lora_a = gather_tensors({name: a for name, (a, _) in whole.items()}, *stages)
    lora_b = gather_tensors({name: b for name, (_, b) in whole.items()}, *stages)
    lora = model.lora
    assert lora is not None  # a model without an adapter is not trained
    alphas = {name: own.alpha for name in lora_a if (own := lora.of(name))}
    if layout.is_first:
        with publish(target) as partial:
            write_adapter(
                partial,
                {name: (a, lora_b[name]) for name, a in lora_a.items()},
                config=model.config,
                dim=lora.spec.dim,
                alpha=lora.spec.alpha,
                dropout=lora.spec.dropout,
                use_rslora=lora.spec.use_rslora,
                alphas=alphas,
                base_model_name_or_path=base_model_name_or_path,
            )
            if tokenizer_dir is not None:
                copy_files(tokenizer_dir, partial, TOKENIZER_FILES)
            copy_files(packed_root, partial, [CHAT_TEMPLATE])
            write_artifact(
                partial,
                artifact_type="checkpoint_lora",
                produced_by=produced_by,
                inputs=inputs,
                properties=properties | {"iteration": iteration},
            )
        write_text(directory / TRACKER, f"{iteration}\n")
    layout.barrier()
    return target
