"""``torchrun``, but it ends with the exit code of the first rank that failed, and reports it once.

torchrun turns every failure into exit code 1 and prints its own report below the error that the
rank has already printed. Its arguments, its supervision and its ranks are unchanged here, but when
a rank has left its error in ``NEMOTRON_ERROR_FILE``, torchrun's report is suppressed. A rank that
was killed cannot report; that is done for it here, and it takes precedence over the errors that
the other ranks raised when they lost the connection.

SIGTERM and SIGUSR1 ask the job to save and stop. torchrun would kill the ranks 30 seconds later;
here the signals are passed on, and the ranks take as long as the step and the save take. Whoever
sent the signal has a time limit of its own.

In a job of several nodes, the first node keeps the store in which the nodes meet. At the end it
waits a moment before it leaves, so that the others do not take its leaving for a failure.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar, NamedTuple

from torch.distributed import run as torchrun
from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nemotron.artifacts import write_text
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._training.heartbeat import LastWords, last_words

ERROR_FILE = "NEMOTRON_ERROR_FILE"
# Variables by which launch.sh tells a node its place in a job of several nodes.
_OF_THIS_JOB = ("PET_RDZV_BACKEND", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
# Not SIGABRT: a collective library aborts when another rank has gone.
_DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_STOP = (signal.SIGTERM, signal.SIGUSR1)
# Where torch looks for its allocator's settings; the first one that is set counts.
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}
# How long the ranks have to end once another one has failed; they only need to notice it.
_GRACE_SECONDS = 5
# How long the node with the store stays after the barrier at the end; to pass that, the others
# only have to read one key.
_LEAVE_LAST_SECONDS = 1


class _LostRank(NamedTuple):
    """A rank that ended without reporting an error."""

    rank: int
    problem: str
    fix: str


class _Ranks(SubprocessContext):
    """The ranks of this host: they are told to stop when this process is; lost ones end the job."""

    told_by: signal.Signals | None = None
    was_interrupted = False
    left_early: tuple[int, ...] = ()
    last_words: ClassVar[dict[str, LastWords]] = {}

    def _start(self) -> None:
        # Now, after torch has set its own and before the first rank runs.
        for number in _STOP:
            signal.signal(number, self._tell)
        super()._start()
        signal.signal(signal.SIGINT, self._interrupt)
        if _Ranks.told_by is not None:  # a signal that came before there was a rank to tell
            self._tell(_Ranks.told_by, None)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        codes = {rank: each.proc.poll() for rank, each in self.subprocess_handlers.items()}
        ended = {int(self.envs[rank]["RANK"]): code for rank, code in codes.items()}
        left = tuple(rank for rank, code in ended.items() if code == 0)
        _Ranks.left_early = _Ranks.left_early or left
        if any(ended.values()):  # as long as the store is there
            self._hear_last_words([rank for rank, code in codes.items() if code is not None])
            lost = next(filter(None, itertools.starmap(_lost, ended.items())), None)
            # At once: the other ranks' errors are consequences, and must not be reported first.
            if lost is not None and os.environ.get(ERROR_FILE) and _reported() is None:
                _report_lost(lost)
        super().close(death_sig, min(timeout, _GRACE_SECONDS))

    def _hear_last_words(self, local_ranks: Sequence[int]) -> None:
        for environment in (self.envs[rank] for rank in local_ranks):
            words = last_words(environment)
            if words is not None:
                _Ranks.last_words.setdefault(environment["RANK"], words)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        _Ranks.told_by = signal.Signals(number)
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        _Ranks.was_interrupted = True
        raise SignalException("interrupted", signal.Signals(number))


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun on ``argv`` and return the exit code for the whole job."""
    argv = sys.argv[1:] if argv is None else argv
    _drop_options_of_others(is_alone="--standalone" in argv)
    _let_segments_grow()
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        for logger in _with_children(name):
            logger.addFilter(lambda record: not _is_known())
    multiprocessing.SubprocessContext = _Ranks
    SimpleElasticAgent._exit_barrier = _leave_last
    try:
        # torch makes a directory for logs of ranks even where none are kept, and leaves it.
        with tempfile.TemporaryDirectory(
            prefix="torchrun-", ignore_cleanup_errors=True
        ) as directory:
            torchrun.main([f"--log-dir={directory}", *argv])
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return int(ExitCode.OK)


def _drop_options_of_others(*, is_alone: bool) -> None:
    """Remove torchrun's options from the environment: a job around this one may have set some.

    torchrun takes whatever is not on its command line from PET_*. With PET_NNODES=2, a job of one
    node would wait for another node forever.
    """
    kept = () if is_alone else _OF_THIS_JOB
    for name in [name for name in os.environ if name.startswith("PET_") and name not in kept]:
        del os.environ[name]


def _let_segments_grow() -> None:
    """Let torch's GPU allocator grow its segments, unless the environment says otherwise.

    Micro batches of packed rows all differ in size, so that a block that was freed by one hardly
    fits the next. It is set here because torch reads the variable while it is imported.
    """
    if _ALLOCATOR.isdisjoint(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def _is_known() -> bool:
    """Return whether torchrun's log would repeat what is known: a stop, or a reported error."""
    return _Ranks.told_by is not None or _Ranks.was_interrupted or _reported() is not None


def _leave_last(self: SimpleElasticAgent) -> None:
    """Pass the barrier at the end; on the node with the store, let the others leave first."""
    _pass_exit_barrier(self)
    group = self.get_worker_group()
    if group.group_rank == 0 and (group.group_world_size or 1) > 1:
        time.sleep(_LEAVE_LAST_SECONDS)


_pass_exit_barrier = SimpleElasticAgent._exit_barrier


def _report(failed: ChildFailedError) -> int:
    """Return the exit code of the rank that failed first; report what that rank could not."""
    if _Ranks.told_by is not None and _was_stopped(failed):
        return int(ExitCode.PREEMPTED)
    lost = _first_lost(failed)
    reported = _reported()
    if lost is not None and (reported is None or reported.code == "unexpected"):
        return _report_lost(lost)
    if reported is not None and reported.exit_code:
        return reported.exit_code
    print(failed, file=sys.stderr)
    _, failure = failed.get_first_failure()
    return failure.exitcode if failure.exitcode > 0 else int(ExitCode.RANK_DIED)


def _report_lost(lost: _LostRank) -> int:
    words = _Ranks.last_words.get(str(lost.rank))
    error = NemotronError(
        "rank_died",
        lost.problem if words is None else f"{lost.problem}; its last known step was {words.step}",
        where="" if words is None else words.place,
        fix=lost.fix,
        exit_code=ExitCode.RANK_DIED,
    )
    print(error, file=sys.stderr)
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError):  # a full disk; the exit code still tells
            write_text(Path(path), json.dumps(error.to_dict() | {"rank": lost.rank}))
    return int(error.exit_code)


def _was_stopped(failed: ChildFailedError) -> bool:
    """Return whether the first rank to end did so because it was told to: nothing was lost then."""
    _, first = failed.get_first_failure()
    return first.exitcode == ExitCode.PREEMPTED or -first.exitcode in _STOP


def _first_lost(failed: ChildFailedError) -> _LostRank | None:
    """Return the first rank that was lost, if any was.

    Later failures do not count: torchrun itself ends the other ranks of a failed job, by SIGTERM
    and seconds later by SIGKILL. It records the time of a failure in whole seconds.
    """
    first = min(failure.timestamp for failure in failed.failures.values())
    codes = {
        rank: failure.exitcode
        for rank, failure in failed.failures.items()
        if failure.timestamp <= first + 1
    }
    codes |= dict.fromkeys(_Ranks.left_early, 0)
    return next(filter(None, itertools.starmap(_lost, codes.items())), None)


def _lost(rank: int, code: int | None) -> _LostRank | None:
    """Return a rank with this exit code as lost; None if it runs or could report its error."""
    if code is not None and -code in _DEADLY:
        fix = "look at the log above; SIGKILL usually means that memory ran out"
        return _LostRank(rank, f"rank {rank} was killed by {signal.Signals(-code).name}", fix)
    if code == 0:
        fix = "look at the log above for what called exit in that rank"
        return _LostRank(rank, f"rank {rank} exited with code 0 before the others", fix)
    return None


def _with_children(name: str) -> list[logging.Logger]:
    """Return a logger and all below it: a logger's filter does not see its children's records."""
    names = [name, *(child for child in logging.root.manager.loggerDict if child.startswith(name))]
    return [logging.getLogger(child) for child in names]


class _Reported(NamedTuple):
    code: str
    exit_code: int


def _reported() -> _Reported | None:
    """Return code and exit code of the error that a rank has reported, if one has."""
    path = os.environ.get(ERROR_FILE)
    if not path or not Path(path).exists():
        return None
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return _Reported(str(record["code"]), int(record["exit_code"]))
    except (ValueError, KeyError):
        return _Reported("unexpected", 0)  # its rank died while writing


if __name__ == "__main__":
    sys.exit(main())
