"""The record that every run leaves: what ran, from what code, and how it ended.

A job is a directory ``.nemotron/jobs/<time>-<step>-<random>/`` that only its owner can read. It
holds ``job.json`` (this record, secrets hidden), ``train.yaml`` (the config that the step read) and
``log.txt`` (everything that it printed).
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import nemotron
from nemotron import checkout
from nemotron.checkout import Git
from nemotron.errors import ExitCode, NemotronError
from nemotron.files import write_atomically
from nemotron.processes import runs, start_of
from nemotron.redaction import redact_argv, redact_data, redact_text, secret_values

JOBS_ROOT = Path(".nemotron") / "jobs"
RECORD, CONFIG, LOG, ERROR = "job.json", "train.yaml", "log.txt", "error.json"
DIFF = "code.diff"
_NUM_NAMED = 5  # an ambiguous name may fit thousands of jobs

Status = Literal[
    "queued",
    "running",
    "succeeded",
    "failed",
    "preempted",
    "interrupted",
    "cancelled",
    "lost",
    "unknown",
]
ENDED = ("succeeded", "failed", "preempted", "interrupted", "cancelled", "lost")


class Placement(BaseModel):
    """Where a job on another machine is: everything needed to ask about it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["slurm", "lepton"]
    id: str  # the scheduler's own
    name: str
    directory: str  # the job's, on the cluster
    host: str | None = None  # a login node; None for this machine
    user: str | None = None
    port: int | None = None
    identity: str | None = None


class JobRecord(BaseModel):
    """The content of a ``job.json``; times are ISO 8601 with the offset of the host.

    ``pid`` is the launcher that waits for the job and records its end; ``pid_start`` distinguishes
    it from later processes with the same pid. A job with a ``placement`` needs no launcher.
    ``code`` is the digest of the code archive that a remote job runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    step: str
    profile: str | None
    status: Status
    exit_code: int | None = None
    queued: str
    started: str | None = None
    ended: str | None = None
    argv: list[str]
    command: list[str]
    config: dict[str, Any]
    versions: dict[str, str | None]
    git: Git | None
    host: str
    directory: str
    pid: int
    pid_start: str | None = None
    log: str
    executor: str = "local"
    placement: Placement | None = None
    code: str | None = None
    restarts: int = 0
    reason: str = ""
    is_cancelled: bool = False  # somebody has asked for its end
    error: dict[str, Any] | None = None


class Job:
    """One job's directory and its record, which changes while the job runs."""

    def __init__(
        self, path: Path, record: JobRecord, known_secrets: frozenset[str] = frozenset()
    ) -> None:
        self.path = path
        self.record = record
        self._known_secrets = known_secrets

    @property
    def log(self) -> Path:
        """Everything that the job printed."""
        return self.path / LOG

    def change(self, make: Callable[[JobRecord], dict[str, Any] | None]) -> None:
        """Change the record that is on disk now, which others may have changed since; durable.

        Args:
            make: Gets the record and returns the fields to change, or None to leave it.
        """
        # In memory first: what is known here must hold even if the disk is full.
        self.record = self.record.model_copy(update=make(self.record))
        with _locked(self.path):
            try:
                record = _read_record(self.path)
            except NemotronError:  # damaged on disk, but whole here
                self._write()
                return
            changes = make(record)
            self.record = record.model_copy(update=changes)
            if changes is not None:
                self._write()

    def update(self, **changes: Any) -> None:
        """Change fields of the record."""
        self.change(lambda _: changes)

    def _write(self) -> None:
        write_private(self.path / RECORD, self.record.model_dump_json(indent=2) + "\n")

    def start(self) -> None:
        """Record that the job's command runs."""
        self.update(status="running", started=now())

    def end(
        self,
        exit_code: int,
        error: dict[str, Any] | None = None,
        status: Status | None = None,
        **changes: Any,
    ) -> None:
        """Record how the job ended; an end that is recorded already is kept.

        Args:
            exit_code: Its exit code.
            error: The error that it ended with.
            status: Its status, if that does not follow from the exit code.
            changes: Further fields of the record.
        """
        # A job that was read from its record does not know its secrets: the environment may.
        known = self._known_secrets | secret_values(os.environ)
        changes |= {"reason": "", "exit_code": exit_code, "ended": now()}
        changes["error"] = redact_data(error, known)

        def ended(record: JobRecord) -> dict[str, Any] | None:
            if record.status in ENDED:
                return None
            is_cancelled = record.is_cancelled and exit_code == ExitCode.INTERRUPTED
            by_code = "cancelled" if is_cancelled else status_of(exit_code)
            return changes | {"status": status or by_code}

        self.change(ended)

    @contextlib.contextmanager
    def ends_on_error(self, otherwise: ExitCode) -> Iterator[None]:
        """Record the job's end if the block raises; a full disk is ignored.

        Args:
            otherwise: Exit code for an exception that is not a ``NemotronError``.
        """
        try:
            yield
        except NemotronError as error:
            with contextlib.suppress(OSError):
                self.end(int(error.exit_code), error.to_dict())
            raise
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt)
            problem = {"code": "unexpected", "problem": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                if is_interrupt:
                    self.end(ExitCode.INTERRUPTED)
                else:
                    self.end(otherwise, problem)
            raise


def status_of(exit_code: int) -> Status:
    """Return the status of a job that ended with this exit code."""
    statuses: dict[int, Status] = {
        ExitCode.OK: "succeeded",
        ExitCode.PREEMPTED: "preempted",
        ExitCode.INTERRUPTED: "interrupted",
    }
    return statuses.get(exit_code, "failed")


def new_directory(step: str, root: Path | None = None) -> Path:
    """Make the directory of a new job of ``step`` and return it; its name is the job's id."""
    root = (root or JOBS_ROOT).absolute()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    slug = step.replace("/", "-").replace("_", "-")
    while True:
        time = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        path = root / f"{time}-{slug}-{secrets.token_hex(3)}"
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        return path


def create(
    path: Path,
    *,
    step: str,
    profile: str | None,
    argv: Sequence[str],
    command: Sequence[str],
    values: dict[str, Any],
    config_text: str,
    executor: str = "local",
    code: str | None = None,
    known_secrets: frozenset[str] = frozenset(),
) -> Job:
    """Return a queued job in the directory ``path``, with its record and config written.

    Args:
        path: What ``new_directory`` made.
        step: Step id.
        profile: Name of the profile, or None.
        argv: The command line of ``nemotron``.
        command: The exact command that the job runs.
        values: The resolved config.
        config_text: The same as the step reads it.
        executor: Where the job runs.
        code: Digest of the code that is shipped.
        known_secrets: Values that must not be written.
    """
    record = JobRecord(
        id=path.name,
        step=step,
        profile=profile,
        status="queued",
        queued=now(),
        argv=redact_argv(argv, known_secrets),
        command=redact_argv(command, known_secrets),
        config=redact_data(values, known_secrets),
        versions=_versions(),
        git=checkout.commit(),
        host=socket.gethostname(),
        directory=str(Path.cwd()),
        pid=os.getpid(),
        pid_start=start_of(os.getpid()),
        log=str(path / LOG),
        executor=executor,
        code=code,
    )
    write_private(path / CONFIG, config_text)
    write_private(path / LOG, "")
    if record.git is not None and record.git.is_dirty:
        write_private(path / DIFF, redact_text(checkout.difference(), known_secrets))
    job = Job(path, record, known_secrets)
    job._write()
    return job


def list_jobs(root: Path | None = None) -> list[Job]:
    """Return every job below ``root`` whose record can be read, the newest last."""
    found: list[Job] = []
    for path in job_directories(root):
        with contextlib.suppress(NemotronError):
            found.append(read_job(path))
    return found


def job_directories(root: Path | None = None) -> list[Path]:
    """Return the directories of all jobs, the newest last; without a record it is no job."""
    return [path for path in sorted((root or JOBS_ROOT).glob("*")) if (path / RECORD).is_file()]


def read_job(path: Path) -> Job:
    """Return the job in a directory; it is ``lost`` if its launcher ended without recording an end.

    Raises:
        NemotronError: ``job_damaged``.
    """
    record = _read_record(path)
    needs_launcher = record.placement is None and record.host == socket.gethostname()
    is_alone = needs_launcher and not runs(record.pid, record.pid_start)
    if record.status not in ENDED and is_alone:
        record = record.model_copy(update={"status": "lost"})
    return Job(path, record)


def _read_record(path: Path) -> JobRecord:
    try:
        return JobRecord.model_validate_json((path / RECORD).read_bytes())
    except (ValidationError, OSError) as error:
        if isinstance(error, ValidationError) and (keys := _unknown_keys(error)):
            raise NemotronError(
                "job_damaged",
                f"{path / RECORD} is from another version of nemotron: it has {', '.join(keys)}",
                where=str(path / RECORD),
                fix="use the version that ran the job",
                exit_code=ExitCode.IO,
            ) from None
        raise NemotronError(
            "job_damaged",
            f"{path / RECORD} cannot be read: {str(error).splitlines()[0]}",
            where=str(path / RECORD),
            fix=f"remove {path}",
            exit_code=ExitCode.IO,
        ) from None


def _unknown_keys(error: ValidationError) -> list[str]:
    """Return the unknown keys of a record, if they are its only fault; otherwise nothing."""
    faults = error.errors()
    if any(fault["type"] != "extra_forbidden" for fault in faults):
        return []
    return [".".join(map(str, fault["loc"])) for fault in faults]


def find(name: str, root: Path | None = None) -> Job:
    """Return the job with this id, ours or the scheduler's, or the only one whose id contains it.

    Raises:
        NemotronError: ``job_unknown`` or ``job_ambiguous``.
    """
    root = root or JOBS_ROOT
    ids = [path.name for path in job_directories(root)]
    matches = (
        [name] if name in ids else [job.path.name for job in list_jobs(root) if _is(job, name)]
    )
    # Every id contains the empty text, which was hardly meant.
    matches = matches or [job_id for job_id in ids if name and name in job_id]
    if len(matches) == 1:
        return read_job(root / matches[0])
    if matches:
        newest = ", ".join(matches[: -_NUM_NAMED - 1 : -1])
        which = "choose one of" if len(matches) <= _NUM_NAMED else "the newest are"
        raise NemotronError(
            "job_ambiguous", f"{name!r} matches {len(matches)} jobs", fix=f"{which}: {newest}"
        )
    fix = f"the newest is {ids[-1]}" if ids else "run a step first: nemotron steps list"
    raise NemotronError("job_unknown", f"no job {name!r} in {root}", fix=fix)


def _is(job: Job, name: str) -> bool:
    return job.record.placement is not None and job.record.placement.id == name


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, either completely or not at all."""
    write_atomically(path, text, mode=0o600)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a job's record, so that nobody else changes it."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # the file system may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "nemotron": nemotron.__version__,
    }
    for package in ("torch", "pyarrow", "tokenizers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def now() -> str:
    """Return the time as records have it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
