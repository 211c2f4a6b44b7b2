"""Runs on this host: spawn the job, tee what it prints, record how it ends.

A job runs in a process group of its own, so that a Ctrl-C in the terminal reaches the launcher
alone, which then passes it on to all ranks and records the interruption.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Self

from nemotron import jobs, preflight
from nemotron.config import dump
from nemotron.errors import ExitCode, NemotronError, raise_all, writing
from nemotron.jobs import Job
from nemotron.launch.base import Console, Submission
from nemotron.plan import JobPlan
from nemotron.redaction import secret_values

_BLOCK_BYTES = 65536
_GRACE_SECONDS = 2.0  # how long pipes may stay silent once the job has ended


class LocalBackend:
    """This host."""

    def submit(self, plan: JobPlan, console: Console) -> Submission:
        """Run a plan here; produce the inputs first that are missing and have a producer.

        Raises:
            NemotronError: A check failed; nothing was started.
        """
        raise_all(preflight.failures(preflight.check(plan, dry_run=False)))
        job = _record(plan, console)
        if plan.is_detached:
            _detach(job, lambda quiet: _run(plan, job, quiet), console)
            return Submission(job, None)
        return Submission(job, _run(plan, job, console))


def _record(plan: JobPlan, console: Console) -> Job:
    directory = jobs.new_directory(plan.step.id)
    return jobs.create(
        directory,
        step=plan.step.id,
        profile=plan.profile.name if plan.profile else None,
        argv=console.argv,
        command=plan.command(_relative(directory)),
        values=plan.values,
        config_text=dump(plan.values),
        known_secrets=secret_values(os.environ, plan.execution.secrets),
    )


def _run(plan: JobPlan, job: Job, console: Console) -> int:
    """Run the producers of missing inputs, then the plan itself; record the end in all cases."""
    with job.ends_on_error(ExitCode.FAILED):
        code, error = _produce_inputs(plan, console)
        if code == ExitCode.OK:
            code, error = _execute(plan, job, console)
        job.end(code, error)
    return code


def _produce_inputs(plan: JobPlan, console: Console) -> tuple[int, dict[str, Any] | None]:
    """Run one producer after the other until no input is missing that has one.

    Returns:
        Exit code of the first that failed, and what to record about it.

    Raises:
        NemotronError: ``producer_output_missing``: it ended well, but the input is not there.
    """
    done: set[str] = set()
    while True:
        checks = preflight.check(plan, dry_run=False)
        raise_all(preflight.failures(checks))
        maker = next((check.producer for check in checks if check.producer), None)
        if maker is None:
            return int(ExitCode.OK), None
        name = preflight.label(maker)
        if name in done:
            raise NemotronError(
                "producer_output_missing",
                f"{name} ended well, but what {plan.step.id} needs is still not there",
                fix=f"look at what it wrote: nemotron steps run {name} --dry-run",
                exit_code=ExitCode.PREFLIGHT,
            )
        done.add(name)
        console.say(f"{plan.step.id} needs {name}, which runs first")
        code = _run(maker, _record(maker, console), console)
        if code != ExitCode.OK:
            problem = f"{name} failed; {plan.step.id} was not started"
            console.say(problem)
            return code, {"code": "producer_failed", "problem": problem, "exit_code": code}


def _execute(plan: JobPlan, job: Job, console: Console) -> tuple[int, dict[str, Any] | None]:
    """Run the command of a plan; return its exit code and the error that it reported."""
    error_file = job.path / jobs.ERROR
    ours = {"NEMOTRON_ERROR_FILE": str(error_file), "NEMOTRON_JOB": job.record.id}
    environment = os.environ | plan.environment | ours
    console.say(f"running {preflight.label(plan)} ({_relative(job.path)})")
    with _SignalForwarder() as signals:
        process = subprocess.Popen(
            plan.command(_relative(job.path)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            process_group=0,
        )
        signals.forward_to(process)
        job.start()
        try:
            _tee(process, job.log, console)
            code = process.wait()
        except BaseException:
            _signal_group(process, signal.SIGKILL)
            raise
    return _outcome(job, code, signals.received, error_file, console)


def _outcome(
    job: Job, code: int, received: list[int], error_file: Path, console: Console
) -> tuple[int, dict[str, Any] | None]:
    """Turn how the process ended into our exit code; say why if the step did not say it."""
    if received and code != ExitCode.PREEMPTED:
        console.say("interrupted")
        return int(ExitCode.INTERRUPTED), None
    if code == 0:
        return int(ExitCode.OK), None
    reported = _reported(error_file)
    if reported is not None:
        return int(reported["exit_code"]), reported
    if code == ExitCode.PREEMPTED:
        return code, None
    if code < 0:
        error = NemotronError(
            "job_killed",
            f"the job was killed by signal {-code} ({signal.Signals(-code).name})",
            where=_relative(job.log),
            fix="look at the end of the log; SIGKILL mostly means that memory ran out",
            exit_code=ExitCode.RANK_DIED,
        )
        code = int(ExitCode.RANK_DIED)
    else:
        error = NemotronError(
            "job_failed",
            f"the job ended with exit code {code} and reported no error",
            where=_relative(job.log),
            fix="look at the end of the log",
            exit_code=ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED,
        )
    console.say(str(error))
    return code, error.to_dict()


def _reported(error_file: Path) -> dict[str, Any] | None:
    """Return the error that the step left; None if it left none, or died while writing it."""
    try:
        return json.loads(error_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _tee(process: subprocess.Popen[bytes], log: Path, console: Console) -> None:
    """Copy what the job prints, as it comes, to the terminal and to the log."""
    assert process.stdout is not None  # noqa: S101 - opened as pipes
    assert process.stderr is not None  # noqa: S101
    with (
        process.stdout,
        process.stderr,
        selectors.DefaultSelector() as selector,
        log.open("ab", buffering=0) as log_stream,
    ):
        selector.register(process.stdout, selectors.EVENT_READ, console.stdout)
        selector.register(process.stderr, selectors.EVENT_READ, console.stderr)
        while selector.get_map():
            ready = selector.select(timeout=_GRACE_SECONDS)
            if not ready and process.poll() is not None:
                _signal_group(process, signal.SIGKILL)  # a stray rank holds the pipes open
                return
            for key, _ in ready:
                block = os.read(key.fd, _BLOCK_BYTES)
                if not block:
                    selector.unregister(key.fileobj)
                    continue
                with writing(log):
                    log_stream.write(block)
                _show(key.data, block)


def _show(stream: BinaryIO, block: bytes) -> None:
    try:
        stream.write(block)
        stream.flush()
    except BrokenPipeError:
        # Whoever read the terminal is gone (| head); the job and its log go on.
        return


class _SignalForwarder:
    """Passes SIGINT, SIGTERM and SIGUSR1 on to the job's process group, and remembers them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python takes signals in its main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def forward_to(self, process: subprocess.Popen[bytes]) -> None:
        """Name the job; a signal that came before it is passed on now."""
        self._process = process
        for number in self.received:
            _signal_group(process, number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C of an impatient user ends ranks that hang.
        is_again = number in self.received
        self.received.append(number)
        if self._process is not None:
            _signal_group(self._process, signal.SIGKILL if is_again else number)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # An empty group is gone (ProcessLookupError), or is one zombie (PermissionError on macOS).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _detach(job: Job, run: Callable[[Console], int], console: Console) -> None:
    """Run in a session of its own, with no terminal; what it says goes to the job's log.

    Forks twice: the process that runs is nobody's child, hence no zombie, and no terminal's.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ready, tell = os.pipe()
    first = os.fork()
    if first:
        os.close(tell)
        os.waitpid(first, 0)
        os.read(ready, 1)  # until the record names the process that will end it
        os.close(ready)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    log = os.open(job.log, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)

    def say(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    try:
        job.update(pid=os.getpid())
        os.close(tell)
        with os.fdopen(null, "wb") as nowhere:
            run(Console(console.argv, say, nowhere, nowhere))
    except NemotronError as error:
        say(str(error))
    except BaseException:
        say(traceback.format_exc())
    finally:
        os._exit(0)


def _relative(path: Path) -> str:
    """Return a path relative to the working directory, in which the job runs too."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
