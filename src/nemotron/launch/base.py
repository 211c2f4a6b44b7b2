"""What every backend offers, and what it needs from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from nemotron.jobs import Job
from nemotron.plan import JobPlan


@dataclass(frozen=True)
class Console:
    """Where a backend shows what happens, and the command line that it records."""

    argv: Sequence[str]
    say: Callable[[str], None]
    stdout: BinaryIO
    stderr: BinaryIO


@dataclass(frozen=True)
class Submission:
    """A job that was started; ``exit_code`` is None when it runs on, detached."""

    job: Job
    exit_code: int | None


class Backend(Protocol):
    """An executor."""

    def submit(self, plan: JobPlan, console: Console) -> Submission:
        """Start the plan; wait for its end unless the plan is detached."""
        ...
