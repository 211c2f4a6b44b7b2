"""What an exit code means, for jobs on this host, on Slurm and on Lepton alike.

A job tells how it ended by its exit code and by the error that it reported. Whoever told it to stop
knows one thing more: that the signal which ended it was no accident.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemotron.errors import ExitCode, NemotronError


class Ending(NamedTuple):
    """How a job ended."""

    exit_code: int
    error: dict[str, Any] | None = None
    news: str = ""  # the error as text, where the job has not printed one itself


def ending(
    code: int,
    *,
    told_by: Sequence[int] = (),
    reported: dict[str, Any] | None = None,
    log: str = "",
) -> Ending:
    """Return how a job ended.

    Args:
        code: Its exit code: -N of a process that signal N killed; a shell says 128 + N of it.
        told_by: Signals that asked it to stop, in their order.
        reported: The error that it reported.
        log: Where to look.
    """
    if code == ExitCode.OK:
        return Ending(code)
    is_stopped = code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
    # A rank that stops breaks the others' connections; their complaints are no error of the job.
    if reported is not None and not (is_stopped and reported["code"] == "unexpected"):
        return Ending(int(reported["exit_code"]), reported)
    if is_stopped:
        return Ending(code)
    number = -code if code < 0 else code - 128
    # The second Ctrl-C kills the ranks.
    if number in told_by or (number == signal.SIGKILL and told_by.count(signal.SIGINT) > 1):
        return stopped(told_by)
    # Python ends with 1 if Ctrl-C comes while it still imports what the step needs.
    if signal.SIGINT in told_by and code == 1:
        return stopped(told_by)
    return _killed(number, log) if 0 < number < signal.NSIG else _failed(code, log)


def reported_error(file: Path) -> dict[str, Any] | None:
    """Return the error that a process left in ``NEMOTRON_ERROR_FILE``.

    None if it left none, or died while it was writing it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def stopped(told_by: Sequence[int]) -> Ending:
    """Return the end of a job that ended, or never began, because of these signals."""
    is_interrupt = signal.SIGINT in told_by
    return Ending(int(ExitCode.INTERRUPTED if is_interrupt else ExitCode.PREEMPTED))


def _killed(number: int, log: str) -> Ending:
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    error = NemotronError(
        "job_killed",
        f"the job was killed by signal {number} ({name})",
        where=log,
        fix="look at the end of the log; SIGKILL usually means that memory ran out",
        exit_code=ExitCode.RANK_DIED,
    )
    return Ending(int(error.exit_code), error.to_dict(), str(error))


def _failed(code: int, log: str) -> Ending:
    """Keep the exit code: one that is none of a step's own comes from a command before the step."""
    error = NemotronError(
        "job_failed",
        f"the job ended with exit code {code} without reporting an error",
        where=log,
        fix="look at the end of the log",
    )
    return Ending(code, error.to_dict() | {"exit_code": code}, str(error))
