"""The types that the backends share: what they get, what they return, what a remote one does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from nemotron import jobs
from nemotron.jobs import Job, Placement
from nemotron.launch.archive import Archive
from nemotron.launch.signals import Interrupts
from nemotron.plan import JobPlan
from nemotron.redaction import secret_values


class Output(Protocol):
    """A stream that takes what a job prints."""

    def write(self, block: bytes, /) -> object:
        """Write a block."""
        ...

    def flush(self) -> object:
        """Pass on what was written."""
        ...


@dataclass(frozen=True)
class Console:
    """Where a backend shows what happens, and the command line that it records."""

    argv: Sequence[str]
    say: Callable[[str], None]
    stdout: Output
    stderr: Output


def create_job(
    directory: Path,
    plan: JobPlan,
    console: Console,
    *,
    command: Sequence[str],
    code: str | None = None,
) -> Job:
    """Return a plan's job in a directory that ``jobs.new_directory`` made; see ``jobs.create``."""
    return jobs.create(
        directory,
        step=plan.step.id,
        profile=plan.profile.name if plan.profile else None,
        argv=console.argv,
        command=command,
        values=plan.values,
        config_text=plan.config_text,
        executor=plan.executor,
        code=code,
        known_secrets=secret_values(os.environ, plan.execution.secrets),
    )


@dataclass(frozen=True)
class Submission:
    """A job that was started; ``exit_code`` is None when it runs on, detached."""

    job: Job
    exit_code: int | None


class ShippedFiles(Protocol):
    """What a remote job is made of; each backend adds what is its own."""

    @property
    def launch(self) -> str:
        """Text of ``launch.sh``."""
        ...

    @property
    def archive(self) -> Archive | None:
        """The code; None where the profile names a ``code_path``."""
        ...


Files = TypeVar("Files", bound=ShippedFiles)


class RemoteBackend(Protocol[Files]):
    """What the modules ``slurm`` and ``lepton`` have in common."""

    def preview(self, plan: JobPlan) -> dict[str, str]:
        """Return what a submission of the plan would hand over, by name."""
        ...

    def require_inputs(self, plan: JobPlan) -> None:
        """Refuse a plan whose inputs are not where the job will run."""
        ...

    def files(self, plan: JobPlan, job_id: str) -> Files:
        """Return everything of ours that the job consists of."""
        ...

    def submit(
        self,
        plan: JobPlan,
        shipped: Files,
        *,
        job_id: str,
        console: Console,
        interrupts: Interrupts,
    ) -> Placement:
        """Hand the job over and return where it is; from the hand-over on signals are kept."""
        ...
