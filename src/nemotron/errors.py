"""The one error that users see, and the exit codes it ends with.

Everything that a user can mend is raised as a ``NemotronError``: what went wrong, where, why, and
the command or edit that mends it. The command line and a step's entry point print it without a
traceback and exit with its code. This module imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what only a write can meet
# Why a system refuses to read or write that whoever runs the command can mend.
_REFUSALS = (
    *NO_ROOM,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE),
)


class ExitCode(IntEnum):
    """Exit codes of ``nemotron`` and of every step; the table in ``docs/reference`` is this one."""

    OK = 0
    FAILED = 1  # it ran and failed
    USAGE = 2  # usage or config: nothing was started
    PREFLIGHT = 3  # a check before the start failed: nothing was started
    DATA = 4  # bad data: inputs that contradict each other or are damaged
    NUMERIC = 5  # a loss or gradient that is not finite
    IO = 6  # could not read or write
    LOCKED = 7  # another run writes to the same output
    RANK_DIED = 8  # a rank of the job died
    SUBMISSION = 9  # the scheduler or service refused the job
    PREEMPTED = 75  # stopped from outside, saved, resumable
    INTERRUPTED = 130  # Ctrl-C


class NemotronError(Exception):
    """An error that a user can mend.

    Args:
        code: Stable name of the error, snake case, such as ``unknown_key``.
        problem: One line: what is wrong, with the value got and the value wanted.
        where: File and line, key, argument or rank.
        why: The cause, where it is not obvious from the problem.
        fix: The command or edit that mends it.
        exit_code: What the process exits with.
    """

    def __init__(
        self,
        code: str,
        problem: str,
        *,
        where: str = "",
        why: str = "",
        fix: str = "",
        exit_code: ExitCode = ExitCode.USAGE,
    ) -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem
        self.where = where
        self.why = why
        self.fix = fix
        self.exit_code = exit_code

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.problem}"]
        parts = (("where", self.where), ("why", self.why), ("fix", self.fix))
        lines += [f"  {name}: {text}" for name, text in parts if text]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the error as data, for ``--json`` and for the error file of a job."""
        return {
            "code": self.code,
            "problem": self.problem,
            "where": self.where,
            "why": self.why,
            "fix": self.fix,
            "exit_code": int(self.exit_code),
        }


class CombinedError(NemotronError):
    """Errors that were found together, printed one after the other; take the first one's code."""

    def __init__(self, errors: Sequence[NemotronError]) -> None:
        first = errors[0]
        super().__init__(
            first.code, f"{len(errors)} errors", fix=first.fix, exit_code=first.exit_code
        )
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Return the errors as data: one's fields for the whole, and each under ``errors``."""
        return super().to_dict() | {"errors": [error.to_dict() for error in self.errors]}


def raise_all(errors: Sequence[NemotronError]) -> None:
    """Raise what is in ``errors``: nothing, the one error, or all of them as one."""
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedError(errors)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name ``path`` in an error of the block that says there is no room, and not where.

    The system names a file that cannot be opened, and none that cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = os.fspath(path)
        raise


def system_refusal(error: OSError, *, origin: str = "") -> NemotronError | None:
    """Return what the system refused to read or write; None if it is no fault of the place.

    ``origin`` says where it was raised, for an error that names no path.
    """
    if error.errno not in _REFUSALS:
        return None
    name, fix = (
        error.filename,
        "check that it exists and that you have access, or choose another path",
    )
    if error.errno in NO_ROOM:
        name = error.filename2 or name  # of a copy, the one that was written
        fix = "free space there (df, quota and ulimit -f show the limits), or choose another path"
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
    return NemotronError(
        "input_output_failed",
        f"{error.strerror}{notes}",
        where=origin if name is None else os.fsdecode(name),
        fix=fix,
        exit_code=ExitCode.IO,
    )
