"""A whole run: plans, tokenizes, packs and publishes, reusing what earlier runs have done.

On several nodes the first one runs this, and the others help it with both stages (see ``team.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemotron.artifacts import MANIFEST, Producer, publish, read_artifact, verify_files
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps._host import available_cores
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.checks import datasets_of
from nemotron.steps.data_prep.sft_packing.engine import EngineMismatchError
from nemotron.steps.data_prep.sft_packing.executors import Outcome, Task, run_tasks
from nemotron.steps.data_prep.sft_packing.job import Job, Workspace, plan_job, workspace_of
from nemotron.steps.data_prep.sft_packing.output import assemble
from nemotron.steps.data_prep.sft_packing.progress import Progress
from nemotron.steps.data_prep.sft_packing.ray_nodes import leading_ray, lend_to_ray
from nemotron.steps.data_prep.sft_packing.receipts import Receipt, read_receipt
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.stages import Packing, plan_packing, tokenize_tasks
from nemotron.steps.data_prep.sft_packing.team import Helper, Leader, Stage, role_of


def pack_conversations(config: Config, producer: Producer) -> dict[str, Any] | None:
    """Write the artifact that a config describes and return its properties.

    Returns:
        None on a node that helped another one: that one writes and reports.

    Raises:
        NemotronError: Every error of the step's manifest.
    """
    role = role_of(workspace_of(config.output_dir).root)
    with clear_write_errors(config.output_dir):
        if role is not None and config.execution_mode == "ray":
            return _pack_on_ray(config, producer, role)
        if isinstance(role, Helper):
            _help(config, role)
            return None
        with role.leading() if role is not None else nullcontext():
            return _pack(config, producer, role)


def _pack(config: Config, producer: Producer, leader: Leader | None) -> dict[str, Any]:
    job = plan_job(config, datasets_of(config))
    if config.force:
        job.workspace.clear()
    elif (finished := _finished(config.output_dir, job.pack_key)) is not None:
        print(f"{STEP}: {config.output_dir} is up to date, nothing to do", flush=True)
        return finished
    with publish(config.output_dir, step=producer.step) as directory:
        job, packing, receipts = _work(config, job, leader)
        properties = assemble(directory, job, packing, receipts, produced_by=producer)
    _tidy(job, keep_tokens=config.keep_tokens)
    return properties


def _pack_on_ray(
    config: Config, producer: Producer, role: Leader | Helper
) -> dict[str, Any] | None:
    num_cores = config.num_workers or available_cores()
    if isinstance(role, Helper):
        lend_to_ray(role, num_cores)
        return None
    with leading_ray(role, num_cores):
        return _pack(config, producer, None)


def _help(config: Config, helper: Helper) -> None:
    """Do this node's share of what the leader asks for."""
    with helper.helping():
        job = plan_job(config, datasets_of(config))
        for order in helper.orders():
            if job.encoder.engine != order.engine:
                job = plan_job(config, job.blend, engine=order.engine)
            tasks: Sequence[Task] = tokenize_tasks(job)
            if order.stage == "pack":
                receipts = [read_receipt(task.directory, task.key) for task in tasks]
                job = replace(job, pack_key=order.pack_key)
                tasks = packing_of(config, job, receipts).tasks
            helper.do(order, tasks, partial(_run_here, config))


def _finished(output: Path, pack_key: str) -> dict[str, Any] | None:
    """Return the properties of an output that already is what this run would write, or None."""
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


def _work(config: Config, job: Job, leader: Leader | None) -> tuple[Job, Packing, list[Receipt]]:
    try:
        receipts = run_stage(config, "tokenize", tokenize_tasks(job), job, leader)
    except EngineMismatchError as error:
        print(f"{STEP}: kitoken and tokenizers differ, continuing with tokenizers: {error}")
        job = plan_job(config, job.blend, engine="tokenizers")
        receipts = run_stage(config, "tokenize", tokenize_tasks(job), job, leader)
    packing = packing_of(config, job, receipts)
    return job, packing, run_stage(config, "pack", packing.tasks, job, leader)


def packing_of(config: Config, job: Job, receipts: Sequence[Receipt]) -> Packing:
    """Return the second stage of a run from the receipts of the first.

    Raises:
        NemotronError: As ``plan_packing``.
    """
    return plan_packing(
        job,
        receipts,
        max_bad_fraction=config.max_bad_fraction,
        sample=config.sample,
        sample_seed=config.sample_seed,
    )


def run_stage(
    config: Config, name: Stage, tasks: Sequence[Task], job: Job, leader: Leader | None = None
) -> list[Receipt]:
    """Run the tasks of a stage, showing progress, and return their receipts.

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

    work = partial(_run_here, config)
    if leader is None:
        receipts = work(tasks, on_done)
    else:
        receipts = leader.share(
            name,
            tasks,
            engine=job.encoder.engine,
            pack_key=job.pack_key,
            work=work,
            on_done=on_done,
        )
    progress.finish()
    return receipts


def _run_here(
    config: Config, tasks: Sequence[Task], on_done: Callable[[Outcome], None]
) -> list[Receipt]:
    return run_tasks(
        tasks, num_workers=config.num_workers, mode=config.execution_mode, on_done=on_done
    )


def _tidy(job: Job, *, keep_tokens: bool) -> None:
    """Remove what the next run cannot reuse: shards, and tokens of other inputs or templates."""
    workspace: Workspace = job.workspace
    if not keep_tokens:
        workspace.clear()
        return
    shutil.rmtree(workspace.packs, ignore_errors=True)
    keys = {task.key for task in tokenize_tasks(job)}
    for path in workspace.tokens.iterdir():
        if path.name.split("-")[0].split(".")[0] not in keys:
            path.unlink(missing_ok=True)


@contextmanager
def clear_write_errors(output: Path) -> Iterator[None]:
    """Turn system errors of a run into one that says where it could not write, and why.

    They come from writing: where reading fails, another error is raised.
    """
    try:
        yield
    except OSError as error:
        where = str(error.filename or output)
        raise step_error(STEP, "cannot_write", str(error), where=where) from None
