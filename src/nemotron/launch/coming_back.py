"""Returns to a job from its record: shows its state and log, waits for it, or cancels it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from nemotron import jobs
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Job, JobRecord
from nemotron.launch.base import Console
from nemotron.launch.lepton_jobs import LeptonHandle
from nemotron.launch.remote import FINAL, MOST_FAILED_POLLS, Handle, OnInterrupt, follow, note
from nemotron.launch.slurm_jobs import SlurmHandle
from nemotron.processes import runs

_POLL_SECONDS = 0.2
_KILL_AFTER_SECONDS = 30.0


def handle_of(job: Job) -> Handle:
    """Return the handle of a job that was placed on another machine."""
    placement = job.record.placement
    assert placement is not None  # noqa: S101 - caller
    return SlurmHandle(placement) if placement.executor == "slurm" else LeptonHandle(placement)


def refresh(job: Job) -> Job:
    """Return a job as its scheduler sees it now."""
    if job.record.placement is None or job.record.status in jobs.ENDED:
        return jobs.read_job(job.path)
    note(job, handle_of(job).state())
    return job


def logs(job: Job, console: Console, *, is_followed: bool, on_interrupt: OnInterrupt) -> int | None:
    """Show what a job printed; with ``is_followed`` go on until it has ended.

    Returns:
        The job's exit code where it was followed to its end.

    Raises:
        NemotronError: ``job_lost``: it was followed, and how it ended cannot be known.
    """
    if job.record.placement is None:
        return _local_log(job, console, is_followed, on_interrupt)
    handle = handle_of(job)
    if is_followed and job.record.status not in jobs.ENDED:
        return follow(job, handle, console, on_interrupt)
    state = handle.state()
    note(job, state)
    console.stdout.write(handle.new_output(is_last=True))
    console.stdout.flush()
    return job.record.exit_code if is_followed else None


def wait(job: Job, pause: Callable[[float], None] = time.sleep) -> int:
    """Return the exit code of a job, once it has ended.

    Raises:
        NemotronError: ``job_lost``: how it ended cannot be known.
    """
    num_failed, handle = 0, None
    while True:
        try:
            if job.record.placement is None or job.record.status in jobs.ENDED:
                job = jobs.read_job(job.path)
            else:
                handle = handle or handle_of(job)
                note(job, handle.state())
            num_failed = 0
        except NemotronError as error:  # as in follow()
            num_failed += 1
            if num_failed >= MOST_FAILED_POLLS or error.code in FINAL:
                raise
        record = job.record
        _refuse_lost(record)
        if record.exit_code is not None:
            return record.exit_code
        pause(handle.poll_seconds if handle else _POLL_SECONDS)


def cancel(job: Job, pause: Callable[[float], None] = time.sleep) -> Job:
    """Cancel a job and return it as it is afterwards; one that has ended stays as it is.

    Raises:
        NemotronError: ``job_elsewhere``, and what reaching its scheduler raises.
    """
    job = refresh(job)
    if job.record.status in jobs.ENDED:
        return job
    if job.record.placement is not None:
        handle_of(job).cancel()
        return refresh(job)
    return _cancel_local(job, pause)


def _cancel_local(job: Job, pause: Callable[[float], None]) -> Job:
    record = job.record
    if record.host != socket.gethostname():
        raise NemotronError(
            "job_elsewhere",
            f"{record.id} runs on {record.host}",
            fix=f"run this there: nemotron jobs cancel {record.id}",
        )
    with contextlib.suppress(OSError):  # a full disk must not keep the job from being cancelled
        job.update(is_cancelled=True)
    _interrupt(record)
    asked = time.monotonic()
    while (job := jobs.read_job(job.path)).record.status not in jobs.ENDED:
        if job.record.placement is not None:  # it has been handed to a scheduler meanwhile
            return cancel(job, pause)
        if time.monotonic() - asked > _KILL_AFTER_SECONDS:
            _interrupt(record)  # the second one kills the ranks
            asked = time.monotonic()
        pause(_POLL_SECONDS)
    return job


def _interrupt(record: JobRecord) -> None:
    # Checked at the last moment: the launcher may have ended, and its pid be another process's.
    if runs(record.pid, record.pid_start):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGINT)


def _local_log(
    job: Job, console: Console, is_followed: bool, on_interrupt: OnInterrupt
) -> int | None:
    with job.log.open("rb") as log:
        while True:
            # The record is read before the log: once it says that the job has ended, the log that
            # is read next is complete.
            job = jobs.read_job(job.path)
            record = job.record
            console.stdout.write(log.read())
            console.stdout.flush()
            if not is_followed:
                return None
            if record.placement is not None:  # it has been handed to a scheduler meanwhile
                return logs(job, console, is_followed=True, on_interrupt=on_interrupt)
            _refuse_lost(record)
            if record.status in jobs.ENDED:
                return record.exit_code
            time.sleep(_POLL_SECONDS)


def _refuse_lost(record: JobRecord) -> None:
    if record.status == "lost":
        is_remote = record.placement is not None
        why = "its scheduler no longer knows it" if is_remote else "its launcher is gone"
        raise NemotronError(
            "job_lost",
            f"how {record.id} ended is not known: {why}",
            where=record.log,
            fix=f"look at its log: nemotron jobs logs {record.id}",
            exit_code=ExitCode.RANK_DIED,
        )
