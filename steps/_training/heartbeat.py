"""A thread in each rank that tells the others it is working, and ends the rank if another is not.

Without it, a collective that waits for a stopped process waits for its own timeout, which must be
longer than the slowest step, and then blames the rank that waited. A rank counts as working while
its main thread uses the CPU, waits for another rank, or is blocked in the kernel by a disk: a
shared file system may be unavailable for minutes and come back. A rank that is stopped, or hangs
anywhere else, does none of these. The beat goes through the rendezvous store, so it is the same
under gloo and NCCL.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._entry import origin, report
from nemotron.steps._tensor_parallel import collectives, host_exchange
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.read_ahead import READER

_LEFT = "left"
_TORCH = f"{os.sep}torch{os.sep}"
_PYTHON = sysconfig.get_path("stdlib")
_WHERE_RANKS_WAIT = (
    collectives.__file__,
    host_exchange.__file__,
    str(Path(dist.__file__).parent),
)
_TASKS = Path("/proc/self/task")
# CPU time between two beats that counts as working: more than the interpreter's housekeeping takes.
_IDLE_SECONDS = 1e-3
_LAST_WORDS_SECONDS = 2.0


class LastWords(NamedTuple):
    """What a rank said with its last beat: its last step, and the file and line it was at."""

    step: str
    place: str


class Heartbeat:
    """Watches all ranks of a job; use it as a context.

    Args:
        layout: This rank's groups.
        timeout_seconds: The job ends if a rank does nothing for this long.

    Attributes:
        last_step: Returns this rank's last optimizer step.
    """

    def __init__(self, layout: Layout, timeout_seconds: float) -> None:
        self._rank, self._size = layout.world.rank, layout.world.size
        self._timeout_seconds = timeout_seconds
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self.last_step: Callable[[], int] = int

    def __enter__(self) -> Self:
        if self._size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._size == 1:
            return
        if isinstance(error, SystemExit):
            self._own_exit(error)
        self._leaving.set()
        self._thread.join()
        if isinstance(error, SystemExit):
            # With exit code 0 the launcher and the other ranks would wait for the rest of the job.
            raise SystemExit(int(ExitCode.RANK_DIED)) from error

    def _own_exit(self, error: SystemExit) -> None:
        problem = f"the rank exited by itself with code {error.code}, after step {self.last_step()}"
        died = NemotronError(
            "rank_died",
            problem,
            where=origin(error),
            fix="look at what calls exit there",
            exit_code=ExitCode.RANK_DIED,
        )
        report(died)

    def _watch(self) -> None:
        heard = {rank: ("", time.monotonic()) for rank in range(self._size) if rank != self._rank}
        is_leaving, beat, main = False, 0, _MainThread()
        try:
            # A connection of its own: that of the process group may be blocked in a rendezvous.
            store = _connect(os.environ, self._timeout_seconds)
            while not is_leaving:
                is_leaving = self._leaving.wait(min(1.0, self._timeout_seconds / 4))
                beat += main.works()
                words = f"{beat} {self.last_step()} {main.place()}"
                store.set(str(self._rank), _LEFT if is_leaving else words)
                said = _all_said(store, heard)
                for rank, (last, since) in heard.items():
                    text = said.get(rank, last)
                    heard[rank] = (last, since) if text == last else (text, time.monotonic())
                    if text != _LEFT and time.monotonic() - since > self._timeout_seconds:
                        self._end(rank, text)
        except RuntimeError as error:
            # If the store is gone, so is the launcher, and nothing else would end this rank.
            if not self._leaving.is_set():
                self._end_with(
                    f"the rendezvous store of the job is gone: {error}",
                    "check how the launcher of rank 0's node ended",
                )

    def _end(self, rank: int, text: str) -> None:
        words = _parse(text)
        self._end_with(
            f"rank {rank} has done nothing for {self._timeout_seconds} s; "
            f"its last step was {words.step}",
            "check the process and the host of that rank; dist.heartbeat_timeout_seconds sets the "
            "limit",
            where=words.place,
        )

    def _end_with(self, problem: str, fix: str, where: str = "") -> None:
        error = NemotronError(
            "rank_silent", problem, where=where, fix=fix, exit_code=ExitCode.RANK_DIED
        )
        with contextlib.suppress(OSError):
            report(error)
        # The main thread waits in a collective that nothing else would end.
        os._exit(ExitCode.RANK_DIED)


def _all_said(store: PrefixStore, ranks: Iterable[int]) -> dict[int, str]:
    """Return the last beat of each rank that has sent one; two requests once all ranks have."""
    known = list(ranks)
    if not store.check([str(rank) for rank in known]):
        known = [rank for rank in known if store.check([str(rank)])]
    texts = store.multi_get([str(rank) for rank in known]) if known else []
    return {rank: text.decode() for rank, text in zip(known, texts, strict=True)}


def last_words(environment: Mapping[str, str]) -> LastWords | None:
    """Return the last beat of a rank, given by its environment; None if it is not known.

    Called by the process that started the ranks, as long as the store is there.
    """
    key = environment["RANK"]
    try:
        store = _connect(environment, _LAST_WORDS_SECONDS)
        text = store.get(key).decode() if store.check([key]) else _LEFT
    except RuntimeError:
        return None
    return None if text == _LEFT else _parse(text)


def _connect(environment: Mapping[str, str], timeout_seconds: float) -> PrefixStore:
    store = TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    return PrefixStore("heartbeat", store)


def _parse(text: str) -> LastWords:
    _, step, place = [*text.split(" ", 2), "", ""][:3]
    return LastWords(step or "0", place)


class _MainThread:
    """What this process's main thread is doing, as seen from another thread."""

    def __init__(self) -> None:
        ident = threading.main_thread().ident
        assert ident is not None  # the main thread has started
        self._ident = ident
        self._read_ticks: list[bytes] = []
        # macOS has a clock of the process only, which other threads move on as well.
        own_clock = getattr(time, "pthread_getcpuclockid", None)
        self._clock = own_clock(ident) if own_clock else time.CLOCK_PROCESS_CPUTIME_ID
        self._used_seconds = 0.0

    def works(self) -> bool:
        """Return whether it has used the CPU since the last call, or waits for a rank or a disk."""
        before, self._used_seconds = self._used_seconds, time.clock_gettime(self._clock)
        waits = any(f.f_code.co_filename.startswith(_WHERE_RANKS_WAIT) for f in self._frames())
        others_work = self._disk_or_reader_works()  # always called: it compares with the last call
        return waits or self._used_seconds - before > _IDLE_SECONDS or others_work

    def _disk_or_reader_works(self) -> bool:
        """Return whether a thread is blocked in the kernel, as in fsync, or a reader computes.

        Source: proc_pid_stat(5), after the name in parentheses; a process that is stopped is T.
        """
        readers = {t.native_id for t in threading.enumerate() if t.name.startswith(READER)}
        before, self._read_ticks = self._read_ticks, []
        is_in_kernel = False
        for task in _TASKS.glob("*"):  # only Linux has these
            with contextlib.suppress(OSError):  # the thread has just ended
                fields = (task / "stat").read_bytes().rpartition(b") ")[2].split()
                is_in_kernel |= fields[0] == b"D"
                self._read_ticks += fields[11:13] if int(task.name) in readers else []
        return is_in_kernel or self._read_ticks != before

    def place(self) -> str:
        """Return the file and line that it is at, outside of torch and of Python's library."""
        for frame in self._frames():
            path = frame.f_code.co_filename
            is_of_python = path.startswith(_PYTHON) and "site-packages" not in path
            if not is_of_python and _TORCH not in path:
                return f"{path}:{frame.f_lineno}"
        return ""

    def _frames(self) -> Iterator[FrameType]:
        frame = sys._current_frames().get(self._ident)
        while frame is not None:
            yield frame
            frame = frame.f_back
