"""Submits a job to another machine: checks, records, hands over, and follows it if attached."""

from __future__ import annotations

import signal
from typing import Any

from nemotron import jobs, preflight
from nemotron.errors import ExitCode, raise_all
from nemotron.jobs import Job
from nemotron.launch import lepton, script, slurm
from nemotron.launch.base import Console, RemoteBackend, ShippedFiles, Submission, create_job
from nemotron.launch.coming_back import handle_of
from nemotron.launch.remote import OnInterrupt, follow, leave
from nemotron.launch.secrets import refuse_secrets_in_plan
from nemotron.launch.signals import Interrupts
from nemotron.plan import JobPlan

_BACKENDS: dict[str, RemoteBackend[Any]] = {"slurm": slurm, "lepton": lepton}


def preview(plan: JobPlan) -> dict[str, str]:
    """Return the scripts that a submission of the plan would use, by name; none for this host."""
    if plan.executor == "local":
        return {}
    return _BACKENDS[plan.executor].preview(plan)


def submit_remote(plan: JobPlan, console: Console, *, on_interrupt: OnInterrupt) -> Submission:
    """Submit a plan; follow the job unless the plan is detached.

    Raises:
        NemotronError: A check failed, or the scheduler did not take the job.
    """
    refuse_secrets_in_plan(plan)  # first: what the checks report has the config's values in it
    raise_all(preflight.failures(preflight.check(plan, dry_run=False)))
    backend = _BACKENDS[plan.executor]
    backend.require_inputs(plan)
    directory = jobs.new_directory(plan.step.id)
    shipped = backend.files(plan, directory.name)
    code = shipped.archive.sha256 if shipped.archive else None
    job = create_job(directory, plan, console, command=plan.command("."), code=code)
    jobs.write_private(directory / script.LAUNCH, shipped.launch)
    received = _place(job, plan, backend, shipped, console)
    # What Ctrl-C means is asked while the job is followed; other signals end the launcher alone.
    is_asked_later = set() if plan.is_detached else {signal.SIGINT}
    if set(received) - is_asked_later:
        leave(job, console)
        return Submission(job, int(ExitCode.INTERRUPTED))
    if plan.is_detached:
        return Submission(job, None)
    code = follow(job, handle_of(job), console, on_interrupt, num_interrupts=len(received))
    return Submission(job, code)


def _place(
    job: Job,
    plan: JobPlan,
    backend: RemoteBackend[Any],
    shipped: ShippedFiles,
    console: Console,
) -> list[int]:
    """Hand the job over; record where it is, or why it was not taken.

    Returns:
        The signals that came while it was handed over.
    """
    with Interrupts() as interrupts:
        with job.ends_on_error(ExitCode.SUBMISSION):
            placement = backend.submit(
                plan, shipped, job_id=job.record.id, console=console, interrupts=interrupts
            )
        job.update(placement=placement, log=f"{placement.host or 'here'}:{placement.directory}")
    console.say(f"{job.record.id} is {plan.executor} job {placement.id}")
    return interrupts.received
