"""The run of peft/megatron_bridge: inputs checked, base loaded, adapter trained and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemotron.artifacts import Artifact, Producer, describe_input, read_artifact, verify_files
from nemotron.steps._entry import PreemptedError, step_error
from nemotron.steps._formats.megatron import MegatronCheckpoint, open_megatron
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.batches import BadRowError, PackedSplit
from nemotron.steps._training.checkpoint import SaveFailedError
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.heartbeat import Heartbeat
from nemotron.steps._training.loop import (
    AdamSettings,
    BatchSettings,
    Best,
    Intervals,
    LossNotFiniteError,
    NothingToValidateError,
    Progress,
    Trainer,
    Validation,
)
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.pipeline_schedule import split_layers
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.resume import SavedRun
from nemotron.steps._training.schedule import Schedule
from nemotron.steps._training.trainer_state import load_adapter
from nemotron.steps.peft.megatron_bridge.checks import STEP, layout_errors, target_errors
from nemotron.steps.peft.megatron_bridge.saves import Saves
from nemotron.steps.peft.megatron_bridge.start import ResumeSettings, start_run


@dataclass(frozen=True)
class ModelSettings:
    """How the base is held and computed.

    Attributes:
        dtype: dtype of the base and of activations.
        sequence_parallel: Whether activations between the linears are split over the sequence.
        recompute: Whether layers are computed again in the backward pass.
        num_chunks: Parts of the model on each pipeline stage; more than one: interleaved.
        num_layers_in_first_stage: Layers of the first pipeline stage, where not an equal part.
        num_layers_in_last_stage: Layers of the last pipeline stage, likewise.
    """

    dtype: torch.dtype
    sequence_parallel: bool
    recompute: bool
    num_chunks: int
    num_layers_in_first_stage: int | None
    num_layers_in_last_stage: int | None


def train_adapter(
    *,
    layout: Layout,
    packed_root: Path,
    base_path: Path,
    output: Path,
    lora: LoraTargets,
    batch: BatchSettings,
    schedule: Schedule,
    adam: AdamSettings,
    seed: int,
    intervals: Intervals,
    metrics: MetricsLog,
    model_settings: ModelSettings,
    base_model_name_or_path: str | None,
    produced_by: Producer,
    resume: ResumeSettings,
    stop: StopRequest,
    heartbeat: Heartbeat,
) -> None:
    """Train a LoRA adapter and leave it under ``output`` as ``iter_NNNNNNN`` directories.

    Args:
        layout: This rank's groups.
        packed_root: Output directory of data_prep/sft_packing.
        base_path: Megatron checkpoint.
        output: Where adapters go.
        lora: Adapters, and the linears that get one.
        batch: Batch sizes.
        schedule: Learning rate per iteration.
        adam: Optimizer settings.
        seed: Seed of the adapter, the row order and dropout.
        intervals: Length of the run, and when it evaluates and saves.
        metrics: Where losses go.
        model_settings: Type of the base, and how it is split and computed.
        base_model_name_or_path: What the adapter's config names as its base; the base's own
            source where None.
        produced_by: What to write as producer into artifacts.
        resume: What the run goes on from, and what it keeps for a run that goes on from it.
        stop: Whether to stop at the next step boundary.
        heartbeat: Told which step was the last.

    Raises:
        NemotronError: ``artifact_damaged``, ``no_such_module``, ``layout_unsupported``,
            ``bad_packed_rows``, ``nothing_to_validate``, ``loss_not_finite``, ``resume_mismatch``,
            ``no_save_to_load``, ``output_not_ours``, ``output_path_overlaps_inputs``,
            ``save_failed`` or ``out_of_memory``.
        PreemptedError: The run was asked to stop before its end; all that can be is saved.
    """
    started = time.perf_counter()
    packs = _verified(packed_root, "packed_parquet", layout)
    base = open_megatron(base_path)
    if base.artifact is not None:
        _verified(base.root, "checkpoint_megatron", layout)
    _check_base(base, lora, model_settings, layout)
    model = _load_model(base, lora, model_settings, layout)
    for linear in model.adapted_linears():
        linear.init_lora(seed)
    if layout.is_first:
        _announce(model, lora, time.perf_counter() - started)
    saved = start_run(layout, output, resume, train_iters=intervals.train_iters)
    if saved is None:
        metrics.start()
    else:
        load_adapter(saved.directory, model)
        metrics.resume(saved.iteration, saved.directory)
    heartbeat.last_step = lambda: metrics.iteration
    saves = Saves(
        output=output,
        train_iters=intervals.train_iters,
        resume=resume,
        stop=stop,
        base_model_name_or_path=base_model_name_or_path or _source(base),
        tokenizer_dir=base.hf_dir,
        packed_root=packed_root,
        produced_by=produced_by,
        inputs=[
            describe_input("packed_parquet", packed_root),
            describe_input("checkpoint_megatron", base.root),
        ],
        properties=_properties(packs, base, lora),
    )
    vocab_size = base.config.vocab_size
    train_rows = PackedSplit(packed_root / "splits" / "train", vocab_size=vocab_size)
    valid_rows = PackedSplit(packed_root / "splits" / "valid", vocab_size=vocab_size)
    trainer = Trainer(
        model,
        layout=layout,
        train_rows=train_rows,
        valid_rows=valid_rows if len(valid_rows) else None,
        batch=batch,
        schedule=schedule,
        adam=adam,
        seed=seed,
        metrics=metrics,
    )
    start = _go_on(trainer, saved) if saved else Progress()
    reached = trainer.run(intervals, partial(saves.save, trainer), start=start, stop=stop)
    if reached.iteration < intervals.train_iters or not reached.is_evaluated:
        metrics.stopped(reached.iteration)
        raise PreemptedError(f"stopped at iteration {reached.iteration}/{intervals.train_iters}")


def _load_model(
    base: MegatronCheckpoint, lora: LoraTargets, settings: ModelSettings, layout: Layout
) -> PipelineStage:
    """Return this rank's layers, in as many parts as settings ask for; adapters are zero."""
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


def _go_on(trainer: Trainer, saved: SavedRun) -> Progress:
    """Set the optimizer to where a save was made."""
    trainer.load_moments(saved.directory, saved.iteration)
    trainer.best = Best(*saved.best) if saved.best else None
    before = saved.valid_loss_before
    return Progress(
        saved.iteration,
        before=Validation(*before) if before else None,
        is_evaluated=saved.is_evaluated,
    )


@contextlib.contextmanager
def named_errors(packed_root: Path, output: Path, metrics: MetricsLog) -> Iterator[None]:
    """Turn what training raises into the manifest's errors; to others, add when they came."""
    try:
        yield
    except BadRowError as error:
        raise step_error(STEP, "bad_packed_rows", str(error), where=str(packed_root)) from None
    except LossNotFiniteError as error:
        raise step_error(STEP, "loss_not_finite", str(error), where=str(output)) from None
    except NothingToValidateError as error:
        raise step_error(STEP, "nothing_to_validate", str(error), where=str(packed_root)) from None
    except SaveFailedError as error:
        raise step_error(STEP, "save_failed", str(error), where=str(output)) from None
    except Exception as error:
        if _is_out_of_memory(error):
            problem = f"after step {metrics.iteration}: {error}".splitlines()[0]
            raise step_error(STEP, "out_of_memory", problem) from None
        error.add_note(f"after step {metrics.iteration}")
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the device ran out; torch has a type for that on a GPU only."""
    is_on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _verified(directory: Path, artifact_type: str, layout: Layout) -> Artifact:
    """Return an input's manifest; its files are hashed by all ranks, each a share of them.

    One rank alone would keep the others waiting for longer than a collective may take, with a base
    of some hundred gigabytes on a slow disk.
    """
    artifact = read_artifact(directory, artifact_type)
    share = artifact.files[layout.world.rank :: layout.world.size]
    verify_files(directory, artifact.model_copy(update={"files": share}))
    layout.barrier()
    return artifact


def _check_base(
    base: MegatronCheckpoint, lora: LoraTargets, settings: ModelSettings, layout: Layout
) -> None:
    """Refuse what the base cannot do; the checks before knew the base's config at best."""
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
        num_stages=layout.pipeline.size * settings.num_chunks,
        num_layers_in_first_stage=settings.num_layers_in_first_stage,
        num_layers_in_last_stage=settings.num_layers_in_last_stage,
        where=str(base.root),
    )
    if errors:
        raise errors[0]


def _properties(packs: Artifact, base: MegatronCheckpoint, lora: LoraTargets) -> dict[str, Any]:
    of_base = base.artifact.properties if base.artifact else {}
    return {
        "base_fingerprint": of_base.get("base_fingerprint"),
        "tokenizer_blake3": packs.properties["tokenizer_blake3"],
        "chat_template_sha256": packs.properties["chat_template_sha256"],
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


def _source(base: MegatronCheckpoint) -> str:
    """Return where the base came from on the Hugging Face side, as far as its lineage says."""
    inputs = base.artifact.inputs if base.artifact else ()
    return next((each.path for each in inputs if each.type == "checkpoint_hf"), str(base.root))


def _announce(model: PipelineStage, lora: LoraTargets, seconds: float) -> None:
    factors = [p for linear in model.adapted_linears() for p in (linear.lora_a, linear.lora_b)]
    trained = sum(factor.numel() for factor in factors)
    print(
        f"base loaded in {seconds:.1f} s; {trained:,} adapter parameters on this rank in "
        f"{', '.join(sorted(lora.modules))}",
        flush=True,
    )
