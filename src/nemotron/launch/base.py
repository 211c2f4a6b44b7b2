"""What every backend needs from the command line, records, and returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nemotron import jobs
from nemotron.jobs import Job
from nemotron.plan import JobPlan
from nemotron.redaction import secret_values


@dataclass(frozen=True)
class Console:
    """Where a backend shows what happens, and the command line that it records."""

    argv: Sequence[str]
    say: Callable[[str], None]
    stdout: BinaryIO
    stderr: BinaryIO


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
