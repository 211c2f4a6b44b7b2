"""What asks a launcher to stop: a job of this host is told, handing one over is finished first."""

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
    """Passes what asks this process to stop on to the job's process group, and remembers it.

    SIGHUP, of a terminal that was closed, is passed on as SIGTERM, at which jobs save; where it is
    ignored (``nohup``) it stays so.
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
        """Pass signals on to a job as long as it runs; those that have come, now."""
        self._process = process
        for number in self.received:
            signal_group(process, number)
        try:
            yield
        finally:
            self._process = None

    def _forward(self, number: int, frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        # The second Ctrl-C of an impatient user ends ranks that hang. Other signals may be said
        # twice by who means them once, such as the kernel and the shell of a closed terminal.
        is_impatient = number == signal.SIGINT and number in self.received
        self.received.append(number)
        if self._process is not None and is_impatient:
            kill(self._process)
        elif self._process is not None:
            signal_group(self._process, number)


class Interrupts:
    """Makes SIGTERM and SIGHUP act like Ctrl-C, so that what was made is removed; or keeps all.

    Other people's code is not made for an exception in its middle: Python drops one that meets a
    destructor, gives it another type where a class is made, and a job that a scheduler has taken
    would be recorded as nowhere.
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
        """Take a failure of the block for what a signal that was kept did to it.

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
        # Other signals may be said twice by who means them once, as above.
        if (number == signal.SIGINT) if is_second else not self._is_kept:
            raise KeyboardInterrupt


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process group that a job was started in."""
    # An empty group is gone (ProcessLookupError), or is one zombie (PermissionError on macOS).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a job at once, with its ranks: torchrun has put these into sessions of their own."""
    ranks = descendants(process.pid)  # before their parent is gone
    signal_group(process, signal.SIGKILL)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kill_orphans(process: subprocess.Popen[bytes], job_id: str) -> None:
    """End what a job that failed has left in sessions of its own: ranks whose torchrun was killed.

    They are nobody's descendants, but have the job's id in what they were started with, and hold
    its output. What has an output of its own was meant to stay: a launcher of another job, say.
    No launcher is found either, as a job's id is younger than what its launcher was started with.

    Args:
        process: The job's process, which has ended; its pipes are open here.
        job_id: Id of the job.
    """
    entry = f"NEMOTRON_JOB={job_id}".encode()
    pipes = [pipe.fileno() for pipe in (process.stdout, process.stderr) if pipe]
    held = {f"pipe:[{os.fstat(descriptor).st_ino}]" for descriptor in pipes}
    for path in Path("/proc").glob("[0-9]*"):  # none elsewhere than on Linux
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
