"""What is the same for the jobs of all schedulers: recording, following and leaving them.

A handle asks one scheduler; everything here works with any handle. A job belongs to its scheduler,
not to the launcher: the launcher may end at any time, and another one, in another terminal, can
continue from the record.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Protocol, Self

from nemotron import jobs
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Job, JobRecord, Status
from nemotron.launch.base import Console
from nemotron.launch.ending import ending

OnInterrupt = Literal["ask", "cancel", "leave"]
# A file that was written on another machine may become visible here a moment later.
_SETTLE_SECONDS = 0.3
MOST_FAILED_POLLS = 20
FINAL = ("workspace_refused", "workspace_unknown")


@dataclass(frozen=True)
class State:
    """Where a job stands; ``exit_code`` is None until it has ended."""

    status: Status
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def ended(
        cls,
        exit_code: int,
        error: dict[str, Any] | None,
        restarts: int,
        status: Status | None = None,
    ) -> Self:
        """Return the state of a job that has ended."""
        return cls(status or jobs.status_of(exit_code), "", restarts, exit_code, error)


def ended_silently(code: int, restarts: int) -> State:
    """Return the state of a job that ended with ``code`` and reported no error of its own."""
    end = ending(code)
    return State.ended(end.exit_code, end.error, restarts)


class Handle(Protocol):
    """A job of a scheduler."""

    poll_seconds: float

    def state(self) -> State:
        """Return where the job stands."""
        ...

    def new_output(self, *, is_last: bool = False) -> bytes:
        """Return what the job has printed since the last call."""
        ...

    def cancel(self) -> None:
        """Ask for the end of the job."""
        ...


def note(job: Job, state: State) -> None:
    """Write a state into the job's record if it is news; a recorded end is never changed."""
    if state.exit_code is not None:
        job.end(state.exit_code, state.error, state.status, restarts=state.restarts)
        return

    def news(record: JobRecord) -> dict[str, Any] | None:
        said = {"status": state.status, "reason": state.reason, "restarts": state.restarts}
        is_known = record.model_dump(include=set(said)) == said
        if record.status in jobs.ENDED or state.status == "unknown" or is_known:
            return None
        is_first = state.status == "running" and record.started is None
        return said | ({"started": jobs.now()} if is_first else {})

    job.change(news)


def follow(
    job: Job,
    handle: Handle,
    console: Console,
    on_interrupt: OnInterrupt,
    *,
    num_interrupts: int = 0,
) -> int:
    """Show what a job prints until it has ended; return its exit code.

    Args:
        job: The job.
        handle: Asks its scheduler.
        console: Where to show it.
        on_interrupt: What the first Ctrl-C does; the second one leaves the job in any case.
        num_interrupts: Ctrl-Cs that came already, while the job was submitted.
    """
    with _CtrlC(num_interrupts) as interrupts:
        for state in _states(job, handle, console):
            if state.exit_code is not None:
                return _ended(state, console)
            came = interrupts.came_within(handle.poll_seconds)
            if came and _shall_leave(job, handle, console, on_interrupt, interrupts):
                return int(ExitCode.INTERRUPTED)
    raise AssertionError("a job is followed until it ends")


def _states(job: Job, handle: Handle, console: Console) -> Iterator[State]:
    """Yield the job's states without end; on the way show its output and update its record."""
    num_failed, restarts = 0, job.record.restarts
    said = ""
    while True:
        try:
            state = handle.state()
            _show(console, handle.new_output())
            num_failed = 0
        except NemotronError as error:
            # Schedulers and networks have hiccups, which must not end the following of a job.
            num_failed += 1
            if num_failed == 1:
                console.say(f"{error.problem}; trying again")
            if num_failed >= MOST_FAILED_POLLS or error.code in FINAL:
                raise
            state = State("unknown")
        if state.exit_code is not None:
            time.sleep(_SETTLE_SECONDS)
            _show(console, handle.new_output(is_last=True))
        if state.restarts > restarts:
            restarts = state.restarts
            console.say(f"requeued (restart {restarts})")
        if state.status == "queued" and state.reason not in ("", "None", said):
            said = state.reason
            console.say(f"waiting: {state.reason}")
        note(job, state)
        yield state


def _ended(state: State, console: Console) -> int:
    assert state.exit_code is not None  # noqa: S101 - caller
    if state.error is not None:
        error = state.error
        console.say(f"job {state.status}: [{error['code']}] {error['problem']}")
        if error.get("fix"):
            console.say(f"  fix: {error['fix']}")
    return state.exit_code


def _shall_leave(
    job: Job,
    handle: Handle,
    console: Console,
    on_interrupt: OnInterrupt,
    interrupts: _CtrlC,
) -> bool:
    """Do what the first Ctrl-C asks for; return whether to stop following the job."""
    choice = on_interrupt
    if choice == "ask":
        is_terminal = sys.stdin is not None and sys.stdin.isatty()
        choice = _ask(console, interrupts) if is_terminal else "leave"
    if choice == "cancel" and interrupts.count < 2:
        console.say(f"cancelling {job.record.id}; press Ctrl-C again to leave it as it is")
        handle.cancel()
        return False
    leave(job, console)
    return True


def leave(job: Job, console: Console) -> None:
    """Say how to come back to a job that keeps running."""
    console.say(
        f"{job.record.id} keeps running; to follow it: nemotron jobs logs -f {job.record.id}"
    )


def _ask(console: Console, interrupts: _CtrlC) -> OnInterrupt:
    console.say("Ctrl-C: [c]ancel the job, or [l]eave it running? ")
    interrupts.is_asking = True
    try:
        return "cancel" if sys.stdin.readline().strip().lower().startswith("c") else "leave"
    except KeyboardInterrupt:
        return "leave"
    finally:
        interrupts.is_asking = False


def _show(console: Console, block: bytes) -> None:
    console.stdout.write(block)
    console.stdout.flush()


class _CtrlC:
    """Counts Ctrl-Cs; raises KeyboardInterrupt only during the question, never elsewhere."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.is_asking = False
        self._event = threading.Event()
        if count:
            self._event.set()
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def came_within(self, seconds: float) -> bool:
        """Wait at most this long for a Ctrl-C; return whether one has come since the last call."""
        came = self._event.wait(seconds)
        if came:  # otherwise one that comes just now would be cleared unseen
            self._event.clear()
        return came

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.is_asking:
            raise KeyboardInterrupt
        self._event.set()
        if self.count > 2:
            os._exit(int(ExitCode.INTERRUPTED))  # the scheduler may not answer
