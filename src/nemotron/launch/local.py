"""Runs jobs on this host: starts the job, copies its output to the log, records how it ends.

A job runs in a process group of its own, so that a Ctrl-C in the terminal reaches only the
launcher, which passes it on to all ranks and records the interruption.
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from nemotron import jobs, preflight
from nemotron.errors import ExitCode, NemotronError, raise_all
from nemotron.jobs import Job
from nemotron.launch.base import Console, Submission, create_job
from nemotron.launch.ending import Ending, ending, reported_error, stopped
from nemotron.launch.secrets import refuse_secrets_in_plan
from nemotron.launch.signals import SignalForwarder, kill, kill_orphans, signal_group
from nemotron.plan import JobPlan
from nemotron.processes import start_of

_BLOCK_BYTES = 65536
_GRACE_SECONDS = 2.0  # how long pipes may stay silent once the job has ended


def submit_local(plan: JobPlan, console: Console) -> Submission:
    """Run a plan here, after the producers of those inputs that are missing and have one.

    Raises:
        NemotronError: A check failed; nothing was started.
    """
    refuse_secrets_in_plan(plan)  # first: what the checks report has the config's values in it
    raise_all(preflight.failures(preflight.check(plan, dry_run=False)))
    with SignalForwarder() as signals:
        job = _record(plan, console)
        if plan.is_detached:
            _detach(job, lambda quiet: _run(plan, job, quiet, signals), console)
            return Submission(jobs.read_job(job.path), None)  # with the pid of the new launcher
        return Submission(job, _run(plan, job, console, signals))


def _record(plan: JobPlan, console: Console) -> Job:
    directory = jobs.new_directory(plan.step.id)
    return create_job(directory, plan, console, command=plan.command(_relative(directory)))


def _run(plan: JobPlan, job: Job, console: Console, signals: SignalForwarder) -> int:
    """Run the producers of missing inputs, then the plan itself; record the end in all cases."""
    with job.ends_on_error(ExitCode.FAILED):
        end = _produce_inputs(plan, console, signals)
        if end is None:
            end = _execute(plan, job, console, signals)
        _note(lambda: job.end(end.exit_code, end.error), console)
    return end.exit_code


def _produce_inputs(plan: JobPlan, console: Console, signals: SignalForwarder) -> Ending | None:
    """Run one producer after another until every input that has a producer is there.

    Returns:
        None; or how the plan ends without being run, if a producer failed or was told to stop.

    Raises:
        NemotronError: ``producer_output_missing``: a producer ended well, but its output is
            missing.
    """
    done: set[str] = set()
    while True:
        checks = preflight.check(plan, dry_run=False)
        raise_all(preflight.failures(checks))
        maker = next((check.producer for check in checks if check.producer), None)
        if maker is None:
            return None
        name = preflight.label(maker)
        if name in done:
            raise NemotronError(
                "producer_output_missing",
                f"{name} succeeded, but the input that {plan.step.id} needs is still missing",
                fix=f"see where it writes: nemotron steps run {name} --dry-run",
                exit_code=ExitCode.PREFLIGHT,
            )
        done.add(name)
        console.say(f"{plan.step.id} needs {name}, which runs first")
        refuse_secrets_in_plan(maker)
        code = _run(maker, _record(maker, console), console, signals)
        if signals.received and code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
            return Ending(code)
        if code != ExitCode.OK:
            problem = f"{name} failed; {plan.step.id} was not started"
            console.say(problem)
            error = {"code": "producer_failed", "problem": problem, "exit_code": code}
            return Ending(code, error)


def _execute(plan: JobPlan, job: Job, console: Console, signals: SignalForwarder) -> Ending:
    """Run the command of a plan and return how it ended; say why if the step has not said it."""
    if signals.received:
        console.say(f"told to stop before {preflight.label(plan)} was started")
        return stopped(signals.received)
    console.say(f"running {preflight.label(plan)} ({_relative(job.path)})")
    code = _run_command(plan, job, console, signals)
    end = ending(
        code,
        told_by=signals.received,
        reported=reported_error(job.path / jobs.ERROR),
        log=_relative(job.log),
    )
    news = "interrupted" if end.exit_code == ExitCode.INTERRUPTED else end.news
    if news:
        console.say(news)
    return end


def _run_command(plan: JobPlan, job: Job, console: Console, signals: SignalForwarder) -> int:
    ours = {"NEMOTRON_ERROR_FILE": str(job.path / jobs.ERROR), "NEMOTRON_JOB": job.record.id}
    with job.log.open("ab", buffering=0) as log:
        process = subprocess.Popen(
            plan.command(_relative(job.path)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | plan.environment | ours,
            process_group=0,
        )
        with signals.forwarding_to(process):
            try:
                _note(job.start, console)
                _tee(process, job.record.id, _Log(log, console), console)
                return process.wait()
            except BaseException:
                kill(process)
                raise


def _note(change: Callable[[], None], console: Console) -> None:
    """Change a job's record; a full disk must not end the job."""
    try:
        change()
    except OSError as error:
        console.say(
            f"note: the job's record cannot be written: {error.strerror}; the job continues"
        )


class _Log:
    """The log of a job; what cannot be written on a full disk is lost, which is said once."""

    def __init__(self, stream: io.FileIO, console: Console) -> None:
        self._stream, self._console = stream, console
        self._has_failed = False

    def write(self, block: bytes) -> None:
        try:
            self._stream.write(block)
        except OSError as error:
            if not self._has_failed:
                problem = f"{jobs.LOG} cannot be written: {error.strerror}"
                self._console.say(f"note: the job's {problem}; the job continues")
            self._has_failed = True


def _tee(process: subprocess.Popen[bytes], job_id: str, log: _Log, console: Console) -> None:
    """Copy what the job prints, as it comes, to the terminal and to the log."""
    assert process.stdout is not None  # noqa: S101 - opened as pipes
    assert process.stderr is not None  # noqa: S101
    with process.stdout, process.stderr, selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, console.stdout)
        selector.register(process.stderr, selectors.EVENT_READ, console.stderr)
        while selector.get_map():
            ready = selector.select(timeout=_GRACE_SECONDS)
            if not ready and process.poll() is not None:
                signal_group(process, signal.SIGKILL)  # a stray rank holds the pipes open
                if process.returncode:  # processes left by a job that succeeded may be intended
                    kill_orphans(process, job_id)
                return
            for key, _ in ready:
                block = os.read(key.fd, _BLOCK_BYTES)
                if not block:
                    selector.unregister(key.fileobj)
                    continue
                log.write(block)
                key.data.write(block)
                key.data.flush()


def _detach(job: Job, run: Callable[[Console], int], console: Console) -> None:
    """Run in a new session, without a terminal; messages go to the job's log.

    Forks twice, so that the process that runs is not our child, hence never a zombie, and can get
    no terminal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ready, tell = os.pipe()
    first = os.fork()
    if first:
        os.close(tell)
        os.waitpid(first, 0)
        os.read(ready, 1)  # returns once the record names the process that will end the job
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
        with contextlib.suppress(OSError):  # a full disk
            os.write(log, f"{text}\n".encode())

    try:
        job.update(pid=os.getpid(), pid_start=start_of(os.getpid()))
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
