"""``torchrun`` that ends with the exit code of the first rank that failed, and says it once.

torchrun turns every failure into exit code 1 and prints an account of its own below the one error
that the rank has reported. Here its arguments, its supervision and its ranks are unchanged; when a
rank has left its error in ``NEMOTRON_ERROR_FILE``, torchrun's account of the same is left out. A
rank that was killed cannot report: that is done here, and it outranks what the other ranks made of
their lost connections.

SIGTERM and SIGUSR1 ask the job to save and stop. torchrun would give the ranks 30 seconds and then
kill them; here they are passed on, and the ranks take the time that the step and the save take.
What asked has its own limit.

On several nodes the first one keeps the store in which the nodes meet, also at the end. It waits a
moment before it leaves, so that the others do not take its leaving for a failure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nemotron.artifacts import write_text
from nemotron.errors import ExitCode, NemotronError

ERROR_FILE = "NEMOTRON_ERROR_FILE"
# Not SIGABRT: a collective library aborts when another rank has gone.
_DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_STOP = (signal.SIGTERM, signal.SIGUSR1)
# How long ranks have once another one has failed. All that is left to do is to notice.
_GRACE_SECONDS = 5
# How long the node with the store outlives the barrier at the end. The others have passed it once
# they have read one key.
_LEAVE_LAST_SECONDS = 1


class _Ranks(SubprocessContext):
    """The ranks of this host: told to stop when this process is, and not waited for when lost."""

    was_told = False
    left_early: tuple[str, ...] = ()

    def start(self) -> None:
        super().start()
        for number in _STOP:
            signal.signal(number, self._tell)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        left = (rank for rank, each in self.subprocess_handlers.items() if each.proc.poll() == 0)
        _Ranks.left_early = _Ranks.left_early or tuple(self.envs[rank]["RANK"] for rank in left)
        super().close(death_sig, min(timeout, _GRACE_SECONDS))

    def _tell(self, number: int, frame: FrameType | None) -> None:
        _Ranks.was_told = True
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun on ``argv`` and return the exit code for the whole job."""
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        for logger in _with_children(name):
            # It was told to stop, or a rank has said what went wrong: then this is no news.
            logger.addFilter(lambda record: _reported_code() is None and not _Ranks.was_told)
    multiprocessing.SubprocessContext = _Ranks
    SimpleElasticAgent._exit_barrier = _leave_last
    try:
        torchrun.main(argv)
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return int(ExitCode.OK)


def _leave_last(self: SimpleElasticAgent) -> None:
    """Pass the barrier at the end; on the node with the store, let the others pass it first."""
    _pass_exit_barrier(self)
    group = self.get_worker_group()
    if group.group_rank == 0 and (group.group_world_size or 1) > 1:
        time.sleep(_LEAVE_LAST_SECONDS)


_pass_exit_barrier = SimpleElasticAgent._exit_barrier


def _report(failed: ChildFailedError) -> int:
    """Return the exit code of the rank that failed first; report what that rank could not."""
    if _Ranks.was_told and _was_stopped(failed):
        return int(ExitCode.PREEMPTED)
    lost = _first_lost(failed)
    if lost is not None and _reported_code() in (None, "unexpected"):
        rank, problem, fix = lost
        error = NemotronError("rank_died", problem, fix=fix, exit_code=ExitCode.RANK_DIED)
        print(error, file=sys.stderr)
        path = os.environ.get(ERROR_FILE)
        if path:
            write_text(Path(path), json.dumps(error.to_dict() | {"rank": rank}))
        return int(error.exit_code)
    if _reported_code() is None:
        print(failed, file=sys.stderr)
    _, failure = failed.get_first_failure()
    return failure.exitcode if failure.exitcode > 0 else int(ExitCode.RANK_DIED)


def _was_stopped(failed: ChildFailedError) -> bool:
    """Return whether a rank ended as told, or before it could listen: then nothing was lost."""
    _, first = failed.get_first_failure()
    return first.exitcode == ExitCode.PREEMPTED or -first.exitcode in _STOP


def _first_lost(failed: ChildFailedError) -> tuple[int, str, str] | None:
    """Return a rank that went without a word, what became of it, and what to do.

    torchrun itself ends the other ranks of a failed job, by SIGTERM and seconds later by SIGKILL;
    times of failures are whole seconds.
    """
    first = min(failure.timestamp for failure in failed.failures.values())
    for rank, failure in failed.failures.items():
        if -failure.exitcode in _DEADLY and failure.timestamp <= first + 1:
            fix = "look at the log above; SIGKILL mostly means that memory ran out"
            return rank, f"rank {rank} was killed by {failure.signal_name()}", fix
    for rank in _Ranks.left_early:
        fix = "look at the log above for what called exit in that rank"
        return int(rank), f"rank {rank} ended, with exit code 0, before the others", fix
    return None


def _with_children(name: str) -> list[logging.Logger]:
    """Return a logger and those below it: a filter does not see what children hand up."""
    names = [name, *(child for child in logging.root.manager.loggerDict if child.startswith(name))]
    return [logging.getLogger(child) for child in names]


def _reported_code() -> str | None:
    """Return the code of the error that a rank has reported, if one has."""
    path = os.environ.get(ERROR_FILE)
    if not path or not Path(path).exists():
        return None
    try:
        return str(json.loads(Path(path).read_text(encoding="utf-8"))["code"])
    except (ValueError, KeyError):
        return "unexpected"  # its rank died while writing


if __name__ == "__main__":
    sys.exit(main())
