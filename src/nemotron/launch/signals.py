"""Signals to the launcher: passed on to a job of this host, kept while one is handed over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from nemotron.processes import descendants


class SignalForwarder:
    """Passes signals that ask this process to stop on to the job's process group; remembers them.

    SIGHUP, from a terminal that was closed, is passed on as SIGTERM, on which jobs save. If SIGHUP
    is ignored (``nohup``), it stays ignored.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python takes signals in its main thread only.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def forwarding_to(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Pass signals on to a job during the block; first those that have come already."""
        self._process = process
        for number in self.received:
            signal_group(process, number)
        try:
            yield
        finally:
            self._process = None

    def _forward(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        # The second Ctrl-C of an impatient user ends ranks that hang. Other signals may come twice
        # for one reason: from the kernel and from the shell of a closed terminal, say.
        is_impatient = number == signal.SIGINT and number in self.received
        self.received.append(number)
        if self._process is not None and is_impatient:
            kill(self._process)
        elif self._process is not None:
            signal_group(self._process, number)


class Interrupts:
    """Makes SIGTERM and SIGHUP raise as Ctrl-C does, so that cleanup runs; can keep them instead.

    Signals are kept while other people's code runs, which is not prepared for an exception at any
    place: Python drops one that is raised in a destructor, and changes its type where a class is
    being made. And a job that the scheduler has just taken would be recorded as not submitted.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._is_kept = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python takes signals in its main thread only; what is ignored, as under nohup, stays so.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def keep_from_now_on(self) -> None:
        """Keep signals instead of raising; a second Ctrl-C still raises."""
        self._is_kept = True

    @contextlib.contextmanager
    def blamed_for_failures(self) -> Iterator[None]:
        """Treat a failure of the block as an interrupt if a signal was kept.

        Raises:
            KeyboardInterrupt: The block failed, and a signal had come.
        """
        try:
            yield
        except Exception as error:
            if self.received:
                raise KeyboardInterrupt from error
            raise

    def raise_received(self) -> None:
        """Raise ``KeyboardInterrupt`` if a signal was kept."""
        if self.received:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_second = number in self.received
        self.received.append(number)
        # Other signals may come twice for one reason, as above.
        if (number == signal.SIGINT) if is_second else not self._is_kept:
            raise KeyboardInterrupt


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process group that a job was started in."""
    # An empty group is gone (ProcessLookupError), or is one zombie (PermissionError on macOS).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a job with its ranks, which torchrun has put into sessions of their own."""
    ranks = descendants(process.pid)  # before their parent is gone
    signal_group(process, signal.SIGKILL)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kill_orphans(process: subprocess.Popen[bytes], job_id: str) -> None:
    """Kill what a failed job has left in other sessions: ranks whose torchrun was killed.

    They are no descendants any more, but they have the job's id in their initial environment, and
    the job's pipes open. A process with an output of its own was meant to stay, such as a launcher
    of another job. The job's own launcher is not found: it was started before the id existed.

    Args:
        process: The job's process, which has ended; its pipes are open here.
        job_id: Id of the job.
    """
    entry = f"NEMOTRON_JOB={job_id}".encode()
    pipes = [pipe.fileno() for pipe in (process.stdout, process.stderr) if pipe]
    held = {f"pipe:[{os.fstat(descriptor).st_ino}]" for descriptor in pipes}
    for path in Path("/proc").glob("[0-9]*"):  # only Linux has these
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            is_of_job = entry in (path / "environ").read_bytes().split(b"\0")
            if is_of_job and held & _open_files(path):
                os.kill(int(path.name), signal.SIGKILL)


def _open_files(process: Path) -> set[str]:
    found = set[str]()
    for path in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.add(str(path.readlink()))
    return found
