"""A whole run: plan, tokenize, pack, publish; what an earlier run has done is not done again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron.artifacts import MANIFEST, Producer, publish, read_artifact, verify_files
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.checks import datasets_of
from nemotron.steps.data_prep.sft_packing.engine import EngineMismatchError
from nemotron.steps.data_prep.sft_packing.executors import (
    Outcome,
    Task,
    available_cores,
    run_tasks,
)
from nemotron.steps.data_prep.sft_packing.job import Job, Workspace, plan_job
from nemotron.steps.data_prep.sft_packing.output import assemble
from nemotron.steps.data_prep.sft_packing.progress import Progress
from nemotron.steps.data_prep.sft_packing.receipts import Receipt
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.stages import Packing, plan_packing, tokenize_tasks

# About two seconds of work.
_WORKER_BYTES = 4 << 20


def pack_conversations(config: Config, producer: Producer) -> dict[str, Any]:
    """Write the artifact that a config describes and return its properties.

    Raises:
        NemotronError: Every error of the step's manifest.
    """
    with clear_write_errors(config.output_dir):
        job = plan_job(config, datasets_of(config))
        if config.force:
            shutil.rmtree(job.workspace.root, ignore_errors=True)
        elif (finished := _finished(config.output_dir, job.pack_key)) is not None:
            print(f"{STEP}: {config.output_dir} is up to date, nothing to do", flush=True)
            return finished
        with publish(config.output_dir) as directory:
            job, packing, receipts = _work(config, job)
            properties = assemble(directory, job, packing, receipts, produced_by=producer)
        _tidy(job, keep_tokens=config.keep_tokens)
    return properties


def _finished(output: Path, pack_key: str) -> dict[str, Any] | None:
    """Return the properties of an output that is already what this run would write."""
    if not (output / MANIFEST).is_file():
        return None
    try:
        artifact = read_artifact(output, "packed_parquet")
        if artifact.properties.get("pack_key") != pack_key:
            return None
        verify_files(output, artifact)
    except NemotronError:
        return None
    return artifact.properties


def _work(config: Config, job: Job) -> tuple[Job, Packing, list[Receipt]]:
    try:
        receipts = run_stage(config, "tokenize", tokenize_tasks(job))
    except EngineMismatchError as error:
        print(f"{STEP}: kitoken and tokenizers differ, going on with tokenizers: {error}")
        job = plan_job(config, job.blend, engine="tokenizers")
        receipts = run_stage(config, "tokenize", tokenize_tasks(job))
    packing = plan_packing(
        job,
        receipts,
        max_bad_fraction=config.max_bad_fraction,
        sample=config.sample,
        sample_seed=config.sample_seed,
    )
    return job, packing, run_stage(config, "pack", packing.tasks)


def run_stage(config: Config, name: str, tasks: Sequence[Task]) -> list[Receipt]:
    """Run the tasks of a stage and say how far it is; return their receipts.

    Raises:
        NemotronError: What a task raises.
        EngineMismatchError: See ``TokenizeTask``.
    """
    progress = Progress(
        name,
        total_bytes=sum(task.size_bytes for task in tasks),
        num_tasks=len(tasks),
        interval_s=config.observability.pipeline_logging_interval_s,
    )

    def on_done(outcome: Outcome) -> None:
        receipt = outcome.receipt
        counts = receipt.get("counts", receipt)
        progress.advance(
            outcome,
            size_bytes=tasks[outcome.number].size_bytes,
            rows=counts["rows_read" if name == "tokenize" else "rows"],
            tokens=counts["tokens"],
        )

    receipts = run_tasks(
        tasks,
        num_workers=config.num_workers or _worth_starting(tasks),
        mode=config.execution_mode,
        on_done=on_done,
    )
    progress.finish()
    return receipts


def _worth_starting(tasks: Sequence[Task]) -> int:
    """Return as many workers as have work for longer than it takes to start them."""
    work = sum(task.size_bytes for task in tasks)
    return min(available_cores(), 1 + work // _WORKER_BYTES)


def _tidy(job: Job, *, keep_tokens: bool) -> None:
    """Remove what the next run cannot use: shards, and tokens of other inputs or templates."""
    workspace: Workspace = job.workspace
    if not keep_tokens:
        shutil.rmtree(workspace.root, ignore_errors=True)
        return
    shutil.rmtree(workspace.packs, ignore_errors=True)
    keys = {task.key for task in tokenize_tasks(job)}
    for path in workspace.tokens.iterdir():
        if path.name.split("-")[0].split(".")[0] not in keys:
            path.unlink(missing_ok=True)


@contextmanager
def clear_write_errors(output: Path) -> Iterator[None]:
    """Say where a run could not write, and why, instead of how it found out.

    What cannot be read has an error of its own by then.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or output)
        raise step_error(STEP, "cannot_write", str(error), where=where) from None
