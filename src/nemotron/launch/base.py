"""What every backend needs from the command line, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from nemotron.jobs import Job


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
