"""A run of peft/megatron_bridge: load the base, train and save the adapter, name the errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from nemotron.artifacts import Producer
from nemotron.steps._entry import PreemptedError, step_error
from nemotron.steps._training.batches import BadRowError
from nemotron.steps._training.checkpoint import Origin, SaveFailedError
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.heartbeat import Heartbeat
from nemotron.steps._training.loop import (
    LossNotFiniteError,
    NothingToValidateError,
    Progress,
    Trainer,
)
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.resume import SavedRun, save_name
from nemotron.steps._training.run_directory import best_save
from nemotron.steps._training.trainer_state import load_adapter
from nemotron.steps._training.validation import Best
from nemotron.steps.peft.megatron_bridge.checks import STEP
from nemotron.steps.peft.megatron_bridge.inputs import Inputs, load_model, open_inputs
from nemotron.steps.peft.megatron_bridge.saves import Saves
from nemotron.steps.peft.megatron_bridge.settings import RunSettings
from nemotron.steps.peft.megatron_bridge.start import start_run
from nemotron.steps.peft.megatron_bridge.summary import summary


def train_adapter(
    settings: RunSettings,
    *,
    layout: Layout,
    packed_root: Path,
    base_path: Path,
    output: Path,
    metrics: MetricsLog,
    produced_by: Producer,
    stop: StopRequest,
    heartbeat: Heartbeat,
) -> None:
    """Train a LoRA adapter and leave it under ``output`` as ``iter_NNNNNNN`` directories.

    Args:
        settings: What to do.
        layout: This rank's groups.
        packed_root: Output directory of data_prep/sft_packing.
        base_path: Megatron checkpoint.
        output: Directory for the adapters.
        metrics: Records the losses.
        produced_by: The producer that artifacts name.
        stop: Whether to stop at the next step boundary.
        heartbeat: Is told the number of the last step.

    Raises:
        NemotronError: ``artifact_damaged``, ``no_such_module``, ``layout_unsupported``,
            ``bad_packed_rows``, ``nothing_to_validate``, ``loss_not_finite``, ``resume_mismatch``,
            ``no_save_to_load``, ``output_not_ours``, ``output_path_overlaps_inputs``,
            ``save_failed`` or ``out_of_memory``.
        PreemptedError: The run was asked to stop before its end; all that can be is saved.
    """
    intervals = settings.intervals
    inputs = open_inputs(packed_root, base_path, layout)
    model = load_model(inputs.base, settings, layout)
    saved = start_run(layout, output, settings.resume, train_iters=intervals.train_iters)
    if saved is None:
        metrics.start()
    else:
        load_adapter(saved.directory, model)
        metrics.resume(saved.iteration, saved.directory)
    heartbeat.last_step = lambda: metrics.iteration
    trainer = _trainer(settings, inputs, model, layout, metrics)
    if layout.is_first:
        num_rows = len(trainer.train_rows), len(trainer.valid_rows or ())
        print(summary(settings, layout, *num_rows), flush=True)
    start = _restore(trainer, saved) if saved else Progress()
    saves = _saves(settings, inputs, output, produced_by, stop)
    reached = trainer.run(intervals, partial(saves.save, trainer), start=start, stop=stop)
    if reached.iteration < intervals.train_iters or not reached.is_evaluated:
        metrics.stopped(reached.iteration)
        raise PreemptedError(f"stopped at iteration {reached.iteration}/{intervals.train_iters}")
    if layout.is_first and trainer.best is not None:
        _say_which_is_best(trainer.best, output, reached)


def _say_which_is_best(best: Best, output: Path, reached: Progress) -> None:
    """Name the best save if it is not the newest, or say that none is better than the base."""
    if best.iteration == 0:
        print(f"validation loss never fell below the base's own, {best.lm_loss:.4f}", flush=True)
        return
    save = best_save(output, until=reached.iteration)
    if save is not None and save.name != save_name(reached.iteration):
        print(f"of all saves, {save} has the lowest validation loss", flush=True)


def _trainer(
    settings: RunSettings,
    inputs: Inputs,
    model: PipelineStage,
    layout: Layout,
    metrics: MetricsLog,
) -> Trainer:
    valid_rows = inputs.split("valid")
    return Trainer(
        model,
        layout=layout,
        train_rows=inputs.split("train"),
        valid_rows=valid_rows if len(valid_rows) else None,
        batch=settings.batch,
        schedule=settings.schedule,
        adam=settings.adam,
        seed=settings.seed,
        metrics=metrics,
    )


def _saves(
    settings: RunSettings,
    inputs: Inputs,
    output: Path,
    produced_by: Producer,
    stop: StopRequest,
) -> Saves:
    origin = Origin(
        base_model_name_or_path=settings.base_model_name_or_path or inputs.base_source(),
        tokenizer_dir=inputs.base.hf_dir,
        packed_root=inputs.packed_root,
        produced_by=produced_by,
        inputs=inputs.lineage(),
        properties=inputs.properties(settings.lora),
    )
    return Saves(
        output=output,
        train_iters=settings.intervals.train_iters,
        resume=settings.resume,
        stop=stop,
        origin=origin,
    )


def _restore(trainer: Trainer, saved: SavedRun) -> Progress:
    """Restore the optimizer from a save; return where the run stood then."""
    trainer.load_moments(saved.directory, saved.iteration)
    trainer.best = saved.best
    return Progress(saved.iteration, before=saved.before, is_evaluated=saved.is_evaluated)


@contextlib.contextmanager
def named_errors(packed_root: Path, output: Path, metrics: MetricsLog) -> Iterator[None]:
    """Turn what training raises into the manifest's errors; note the last step on all others."""
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
    """Return whether the device ran out of memory; torch has a type for that on a GPU only."""
    is_on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_on_host or isinstance(error, torch.OutOfMemoryError | MemoryError)
