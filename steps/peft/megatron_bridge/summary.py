"""The lines that a run prints before its first step: what it is going to do."""

from __future__ import annotations

from nemotron.steps._training.device import describe
from nemotron.steps._training.distributed import Layout
from nemotron.steps.peft.megatron_bridge.settings import RunSettings


def summary(settings: RunSettings, layout: Layout, train_rows: int, valid_rows: int) -> str:
    """Return where the run computes, how often it sees each row, and how often it validates.

    Args:
        settings: The settings of the run.
        layout: The layout of its ranks.
        train_rows: Packed rows of the train split.
        valid_rows: Packed rows of the valid split; 0 if there is none.
    """
    return f"{_place(settings, layout)}\n{_work(settings, train_rows, valid_rows)}"


def _place(settings: RunSettings, layout: Layout) -> str:
    """Return a line such as ``8 ranks on NVIDIA H200: TP 2 with SP, PP 1, DP 4; bfloat16``."""
    ranks = _counted(layout.world.size, "rank")
    split = " with SP" if settings.model.sequence_parallel and layout.tensor.size > 1 else ""
    return (
        f"{ranks} on {describe(layout.device)}: TP {layout.tensor.size}{split}, "
        f"PP {layout.pipeline.size}, DP {layout.data.size}; "
        f"{str(settings.model.dtype).removeprefix('torch.')}"
    )


def _work(settings: RunSettings, train_rows: int, valid_rows: int) -> str:
    """Return ``500 steps of 4 rows: 2.4 epochs of 834 rows; 128 rows validated every 50 steps``."""
    intervals, rows_per_step = settings.intervals, settings.batch.global_batch_size
    steps = intervals.train_iters
    epochs = f"{steps * rows_per_step / train_rows:.3g} epochs of {_counted(train_rows, 'row')}"
    work = f"{_counted(steps, 'step')} of {_counted(rows_per_step, 'row')}: {epochs}"
    if settings.schedule.warmup_iters:
        work += f"; warm-up over {_counted(settings.schedule.warmup_iters, 'step')}"
    if not valid_rows:
        return f"{work}; no rows to validate on"
    validated = min(valid_rows, intervals.eval_iters * rows_per_step)
    every = min(steps, intervals.eval_interval, intervals.save_interval)
    return f"{work}; {_counted(validated, 'row')} validated every {_counted(every, 'step')}"


def _counted(number: float, noun: str) -> str:
    return f"{number:.10g} {noun}{'' if number == 1 else 's'}"
