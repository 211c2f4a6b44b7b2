"""The start of a run: its output directory made ready, and the save that it resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.resume import (
    NoSaveToLoadError,
    ResumeMismatchError,
    SavedRun,
    Start,
    choose_start,
    read_saved,
    save_name,
)
from nemotron.steps._training.run_directory import resume_directory, start_directory
from nemotron.steps.peft.megatron_bridge.checks import start_refused


@dataclass(frozen=True)
class ResumeSettings:
    """What a run resumes from, and what it saves so that it can be resumed.

    Attributes:
        load: Directory of another run's saves, or None.
        ckpt_step: The iteration of ``load`` to resume from; None for its newest whole save.
        identity: What the run's result depends on.
        save_optim: Whether saves hold the optimizer state, without which none can be resumed.
        most_recent_k: Saves to keep; -1 for all.
    """

    load: Path | None
    ckpt_step: int | None
    identity: dict[str, Any]
    save_optim: bool
    most_recent_k: int


def start_run(
    layout: Layout, output: Path, resume: ResumeSettings, *, train_iters: int
) -> SavedRun | None:
    """Make ``output`` ready and return the save to resume from; the first rank decides for all.

    Raises:
        NemotronError: ``resume_mismatch``, ``no_save_to_load``, ``output_not_ours`` or
            ``output_path_overlaps_inputs``, on the first rank.
    """
    start = _prepare(output, resume, train_iters) if layout.is_first else Start()
    iteration = start.saved.iteration if start.saved else 0
    iteration, is_in_place = layout.from_first([iteration, int(start.is_in_place)])
    if not iteration:
        return None
    source = output if is_in_place else resume.load
    assert source is not None  # noqa: S101 - choose_start looks in these two alone
    return start.saved or read_saved(source / save_name(iteration))


def _prepare(output: Path, resume: ResumeSettings, train_iters: int) -> Start:
    try:
        start = choose_start(
            output,
            load=resume.load,
            ckpt_step=resume.ckpt_step,
            train_iters=train_iters,
            identity=resume.identity,
        )
    except (ResumeMismatchError, NoSaveToLoadError) as error:
        raise start_refused(error) from None
    lines = list(start.notes)
    if start.saved is not None and start.is_in_place:
        resume_directory(output, start.saved.iteration, start.damaged)
    else:
        previous = start_directory(output, load=resume.load)
        if previous is not None:
            lines.append(f"the earlier run in {output} was kept as {previous}")
    if start.saved is not None:
        lines.append(f"resuming from {start.saved.directory}")
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return start
