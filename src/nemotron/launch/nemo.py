"""The only module that imports nemo-run, which ships a job's files and submits them.

What a job runs is in the files that are handed in. nemo-run writes the directives around them,
copies them to where the job runs, and calls the scheduler. Following, cancelling and exit codes are
ours: nemo-run returns 0 for a job that failed, and loses track of jobs without slurmdbd.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.config import get_nemorun_home, set_nemorun_home
from nemo_run.core.execution import lepton as lepton_execution
from nemo_run.core.execution.base import Executor
from nemo_run.core.tunnel.client import LocalTunnel
from nemo_run.run.torchx_backend.schedulers import lepton, slurm

from nemotron.errors import ExitCode, NemotronError
from nemotron.executors import LeptonExecution
from nemotron.launch.host import Host

TITLE = "nemotron"
# Long, because a busy controller may take minutes to accept a job, and a slow line to copy files.
_SBATCH_SECONDS = 600


@dataclass(kw_only=True)
class ShippedFiles(run.Packager):
    """Puts the files of a directory into the job's ``code/``."""

    source: str

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Copy the files; there is no archive for nemo-run to unpack."""
        shutil.copytree(self.source, Path(job_dir) / "code", dirs_exist_ok=True)
        return ""


@dataclass(kw_only=True)
class Login(LocalTunnel):
    """Runs ``sbatch`` on a machine; if that is not this one, copies the job's files there first.

    nemo-run's own tunnel has an ssh client of its own, which does not read ``~/.ssh/config``.
    """

    machine: Host
    pre_command: str | None = None

    def run(self, command: str, hide: bool = True, warn: bool = False, **options: Any) -> Any:
        """Run a line of shell; return a result of which nemo-run reads only ``stdout``.

        Raises:
            NemotronError: ``submission_failed``, with the command's stderr, and what reaching the
                machine raises.
        """
        if not self.machine.is_local:
            self._send()
        line = f"{self.pre_command} && {command}" if self.pre_command else command
        done = self.machine.run(["sh", "-c", line], timeout=_SBATCH_SECONDS)
        said = done.stderr.decode(errors="replace")
        if done.returncode:
            raise NemotronError("submission_failed", said.strip()[-1000:])
        return subprocess.CompletedProcess(line, 0, done.stdout.decode(errors="replace"), said)

    def _send(self) -> None:
        """Copy the directory that nemo-run has made here for the job."""
        there = Path(self.job_dir)
        here = Path(get_nemorun_home()) / "experiments" / TITLE / there.name
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(here, there.name)
        unpack = 'umask 077; mkdir -p -- "$1" && tar -x -o -f - -C "$1"'
        command = ["sh", "-c", unpack, "sh", str(there.parent)]
        try:
            self.machine.require(command, stdin=packed.getvalue(), timeout=_SBATCH_SECONDS)
        except NemotronError as error:
            if error.code != "host_silent":
                raise
            size, seconds = len(packed.getvalue()) / 2**20, _SBATCH_SECONDS
            problem = f"copying {size:.1f} MiB to {self.machine.name} took longer than {seconds} s"
            raise NemotronError("submission_failed", problem) from None


def experiment_id(job_id: str) -> str:
    """Return nemo-run's name for a job of ours."""
    return f"{TITLE}_{job_id}"


def slurm_executor(
    options: dict[str, Any],
    *,
    source: Path,
    job_root: str,
    machine: Host,
    pre_command: str | None = None,
) -> Executor:
    """Return nemo-run's Slurm executor.

    Args:
        options: Its fields.
        source: Directory of the files to ship.
        job_root: Directory on the cluster below which nemo-run makes the job's.
        machine: Where Slurm's commands run.
        pre_command: Shell code that ``sbatch`` needs before it.
    """
    return run.SlurmExecutor(
        tunnel=Login(job_dir=f"{job_root}/experiments", machine=machine, pre_command=pre_command),
        packager=ShippedFiles(source=str(source)),
        launcher=None,
        poll_estimated_start_time=False,
        **options,
    )


def lepton_executor(
    options: dict[str, Any], *, source: Path, open_client: Callable[[], Any]
) -> Executor:
    """Return nemo-run's Lepton executor with these fields, for the files in ``source``.

    Args:
        options: Its fields.
        source: Directory of the files to ship.
        open_client: Opens a client of the workspace; nemo-run's own waits two minutes for answers.
    """
    lepton_execution.APIClient = open_client
    return run.LeptonExecutor(packager=ShippedFiles(source=str(source)), launcher=None, **options)


def lepton_fields() -> set[str]:
    """Return the fields of nemo-run's Lepton executor that nothing here sets."""
    names = {field.name for field in fields(run.LeptonExecutor) if field.init}
    return names - LeptonExecution.model_fields.keys() - {"packager", "experiment_id", "job_dir"}


def preview(executor: Executor, *, job_id: str, task: str, base: Path) -> str:
    """Return the batch script that a submission would hand to Slurm; contacts nothing.

    Args:
        executor: The executor.
        job_id: Id of the job.
        task: Name of the job's one task.
        base: Directory for the files that nemo-run writes on the way.
    """
    with _quiet(base), _experiment(executor, job_id, base) as experiment:
        experiment.add(run.Script(path="launch.sh", entrypoint="bash"), name=task)
        experiment.dryrun(log=False, delete_exp_dir=False)
    directory = base / "experiments" / TITLE / experiment_id(job_id)
    return (directory / f"{task}_sbatch.sh").read_text(encoding="utf-8")


def submit(executor: Executor, *, job_id: str, task: str, base: Path) -> str:
    """Submit and return the scheduler's own id of the job; arguments as in ``preview``.

    Raises:
        NemotronError: ``submission_failed``, with what the scheduler said.
    """
    refused, handle = "", ""
    with _quiet(base):
        # Only the error's text is kept: the frames of its traceback hold open files.
        try:
            with _experiment(executor, job_id, base) as experiment:
                experiment.add(run.Script(path="launch.sh", entrypoint="bash"), name=task)
                experiment.run(detach=True)
                handle = experiment.jobs[0].handle
        except (Exception, SystemExit) as error:
            refused = _said(error)
    if refused:
        raise NemotronError(
            "submission_failed",
            f"the job could not be submitted: {refused}",
            fix="correct what the message names; --dry-run shows the scripts",
            exit_code=ExitCode.SUBMISSION,
        )
    return handle.rpartition("/")[2].partition(";")[0]


def _said(error: BaseException) -> str:
    """Return the text of an error; only the problem if the error is ours."""
    said = error.problem if isinstance(error, NemotronError) else str(error)
    return said.strip()[-1000:] or type(error).__name__


def _experiment(executor: Executor, job_id: str, base: Path) -> run.Experiment:
    return run.Experiment(
        TITLE,
        id=experiment_id(job_id),
        executor=executor,
        base_dir=str(base),
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
    )


@contextlib.contextmanager
def _quiet(base: Path) -> Iterator[None]:
    """Keep nemo-run's records below ``base``, and keep it from our terminal's output and input."""
    home, level, stdin = get_nemorun_home(), logging.root.level, sys.stdin
    logging.disable(logging.WARNING)
    set_nemorun_home(str(base))
    # Its lists of a user's jobs are for its own commands; our jobs have records of their own.
    lepton.LEPTON_JOB_DIRS = str(base / ".lepton_jobs.json")
    slurm.SLURM_JOB_DIRS = str(base / ".slurm_jobs")
    try:
        with (
            Path(os.devnull).open(encoding="utf-8") as nothing,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            # Its commands would otherwise read from the terminal, or what is piped into us.
            sys.stdin = nothing
            yield
            gc.collect()  # closes the files and pipes that it leaves open, with warnings hidden
    finally:
        sys.stdin = stdin
        set_nemorun_home(home)
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)
