"""The record that every run leaves: what ran, from what code, how it ended.

A job is a directory ``.nemotron/jobs/<time>-<step>-<random>/`` that only its owner can read, with
``job.json`` (this record, secrets hidden), ``train.yaml`` (the config that the step read) and
``log.txt`` (all that it printed).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import nemotron
from nemotron.errors import ExitCode, NemotronError, writing
from nemotron.redaction import redact_argv, redact_data, redact_text

JOBS_ROOT = Path(".nemotron") / "jobs"
RECORD, CONFIG, LOG, ERROR = "job.json", "train.yaml", "log.txt", "error.json"
DIFF = "code.diff"
_NUM_NAMED = 5  # of jobs that a name fits; there may be thousands

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


class Git(BaseModel):
    """The commit of the code that ran; ``is_dirty`` when tracked files differed from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha: str
    is_dirty: bool


class Placement(BaseModel):
    """Where a job of another machine is: all that is needed to ask about it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    executor: Literal["slurm", "lepton"]
    id: str  # the scheduler's own
    name: str
    directory: str  # of the job, there
    host: str | None = None  # a login node; None: this machine
    user: str | None = None
    port: int | None = None
    identity: str | None = None


class JobRecord(BaseModel):
    """The content of a ``job.json``; times are ISO 8601 with the offset of the host.

    ``pid`` is the launcher that waits for the job and records its end; a job with a ``placement``
    needs none. ``code`` is the digest of the code archive that a remote job runs.
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
    log: str
    executor: str = "local"
    placement: Placement | None = None
    code: str | None = None
    restarts: int = 0
    reason: str = ""
    error: dict[str, Any] | None = None


class Job:
    """One job's directory and its record, which changes as the job goes on."""

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

    def update(self, **changes: Any) -> None:
        """Change fields of the record, durably."""
        self.record = self.record.model_copy(update=changes)
        write_private(self.path / RECORD, self.record.model_dump_json(indent=2) + "\n")

    def start(self) -> None:
        """Record that the job's command runs."""
        self.update(status="running", started=now())

    def end(
        self, exit_code: int, error: dict[str, Any] | None = None, status: Status | None = None
    ) -> None:
        """Record how the job ended; ``status`` where the exit code does not say it."""
        statuses: dict[int, Status] = {
            ExitCode.OK: "succeeded",
            ExitCode.PREEMPTED: "preempted",
            ExitCode.INTERRUPTED: "interrupted",
        }
        status = status or statuses.get(exit_code, "failed")
        shown = redact_data(error, self._known_secrets)
        self.update(status=status, reason="", exit_code=exit_code, ended=now(), error=shown)

    @contextlib.contextmanager
    def ends_on_error(self, otherwise: ExitCode) -> Iterator[None]:
        """Record the job's end if the block raises.

        Args:
            otherwise: Exit code where it raises what is no error of ours.
        """
        try:
            yield
        except NemotronError as error:
            self.end(int(error.exit_code), error.to_dict())
            raise
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt)
            problem = {"code": "unexpected", "problem": f"{type(error).__name__}: {error}"}
            self.end(ExitCode.INTERRUPTED if is_interrupt else otherwise, problem)
            raise


def new_directory(step: str, root: Path | None = None) -> Path:
    """Make and return the directory of a new job of ``step``; its name is the job's id."""
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
        git=_git(),
        host=socket.gethostname(),
        directory=str(Path.cwd()),
        pid=os.getpid(),
        log=str(path / LOG),
        executor=executor,
        code=code,
    )
    write_private(path / CONFIG, config_text)
    write_private(path / LOG, "")
    if record.git is not None and record.git.is_dirty:
        write_private(path / DIFF, redact_text(_diff(), known_secrets))
    job = Job(path, record, known_secrets)
    job.update()
    return job


def list_jobs(root: Path | None = None) -> list[Job]:
    """Return every job below ``root`` whose record can be read, the newest last."""
    found: list[Job] = []
    for path in job_directories(root):
        with contextlib.suppress(NemotronError):
            found.append(read_job(path))
    return found


def job_directories(root: Path | None = None) -> list[Path]:
    """Return the directories of all jobs, the newest last; one without a record is none."""
    return [path for path in sorted((root or JOBS_ROOT).glob("*")) if (path / RECORD).is_file()]


def read_job(path: Path) -> Job:
    """Return the job in a directory; one whose launcher is gone without an ending is ``lost``.

    Raises:
        NemotronError: ``job_damaged``.
    """
    try:
        record = JobRecord.model_validate_json((path / RECORD).read_bytes())
    except (ValidationError, OSError) as error:
        raise NemotronError(
            "job_damaged",
            f"{path / RECORD} cannot be read: {str(error).splitlines()[0]}",
            where=str(path / RECORD),
            fix=f"remove {path}",
            exit_code=ExitCode.IO,
        ) from None
    needs_launcher = record.placement is None and record.host == socket.gethostname()
    if record.status not in ENDED and needs_launcher and not _runs(record.pid):
        record = record.model_copy(update={"status": "lost"})
    return Job(path, record)


def find(name: str, root: Path | None = None) -> Job:
    """Return the job with the id ``name``, or the only one whose id contains it.

    Raises:
        NemotronError: ``job_unknown`` or ``job_ambiguous``.
    """
    root = root or JOBS_ROOT
    ids = [path.name for path in job_directories(root)]
    # An empty text is in every id, and was hardly meant as part of one.
    matches = [name] if name in ids else [job_id for job_id in ids if name and name in job_id]
    if len(matches) == 1:
        return read_job(root / matches[0])
    if matches:
        newest = ", ".join(matches[: -_NUM_NAMED - 1 : -1])
        which = "one of" if len(matches) <= _NUM_NAMED else "the newest are"
        raise NemotronError(
            "job_ambiguous", f"{name!r} fits {len(matches)} jobs", fix=f"{which}: {newest}"
        )
    fix = f"the newest is {ids[-1]}" if ids else "run a step first: nemotron steps list"
    raise NemotronError("job_unknown", f"no job {name!r} in {root}", fix=fix)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, complete or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with writing(path), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


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


def _git() -> Git | None:
    """Return the commit of the checkout that this code runs from; None for an installed wheel."""
    source = Path(nemotron.__file__).parent
    # A wheel inside of somebody's checkout is not tracked there: that commit is not ours.
    if _git_output(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = _git_output(source, "rev-parse", "HEAD")
    changed = _git_output(source, "status", "--porcelain", "--untracked-files=no")
    return Git(sha=sha, is_dirty=bool(changed)) if sha else None


def _diff() -> str:
    """Return how the tracked files of the checkout differ from its commit."""
    source = Path(nemotron.__file__).resolve().parent
    return (_git_output(source, "diff", "HEAD", "--", ":/") or "") + "\n"


def _git_output(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def now() -> str:
    """Return the time as records have it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
