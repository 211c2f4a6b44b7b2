"""Slurm: makes the files and directives of a job from a plan, and submits it through nemo-run.

The job runs ``launch.sh``, from ``launch/script.py``, on each node. Secrets are in the environment
of ``sbatch``, which Slurm hands on to the job. Over ssh they get there through a file that only the
user can read and that exists only while ``sbatch`` runs.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nemotron import jobs, preflight
from nemotron.errors import ExitCode, NemotronError, raise_all
from nemotron.executors import SlurmExecution
from nemotron.jobs import Placement
from nemotron.launch import script, squash
from nemotron.launch.archive import Archive, pack_code
from nemotron.launch.base import Console
from nemotron.launch.host import Host
from nemotron.launch.lazy import load_nemo
from nemotron.launch.signals import Interrupts
from nemotron.plan import JobPlan

# Fields that nemo-run's executor has under the same name.
_SAME_NAME = (
    *("account", "time", "cpus_per_task", "cpus_per_gpu", "gpus_per_task", "mem", "mem_per_cpu"),
    *("mem_per_gpu", "qos", "gres", "constraint", "exclude", "comment", "network", "segment"),
    *("signal", "job_name_prefix"),
)
# Directives that it has no field for.
_DIRECTIVES = ("reservation", "dependency", "nodelist")
# Options that Slurm's commands read from the environment; they take precedence over directives.
_OPTIONS = ("SLURM_", "SBATCH_", "SRUN_")
# Those among them that say which cluster is meant, and on whose behalf.
_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class SlurmFiles:
    """The files that a job ships, and the lines of the batch shell around them."""

    launch: str
    config: str
    prologue: str
    archive: Archive | None


def job_root(execution: SlurmExecution) -> str:
    """Return the directory on the cluster for files of jobs."""
    return execution.remote_job_dir or str(Path.cwd() / jobs.JOBS_ROOT.parent / "nemo-run")


def task_name(plan: JobPlan) -> str:
    """Return the step's name as Slurm shows it."""
    return plan.step.id.replace("/", "-").replace("_", "-")


def job_directory(plan: JobPlan, job_id: str) -> PurePosixPath:
    """Return the directory that nemo-run makes for a job on the cluster."""
    root = PurePosixPath(job_root(_execution(plan)))
    return root / "experiments" / "nemotron" / f"nemotron_{job_id}" / task_name(plan)


def files(plan: JobPlan, job_id: str) -> SlurmFiles:
    """Return everything of ours that a job consists of."""
    execution = _execution(plan)
    archive = None if execution.code_path else pack_code()
    directory = job_directory(plan, job_id) / "code"
    return SlurmFiles(
        launch=script.launch_script(plan, job_id=job_id, archive=archive.name if archive else None),
        config=plan.config_text,
        prologue=script.batch_prologue(plan, job_id=job_id, directory=directory),
        archive=archive,
    )


def require_inputs(plan: JobPlan) -> None:
    """Refuse a job over ssh whose inputs are not on the cluster; otherwise preflight has looked.

    Raises:
        NemotronError: An input is missing, all of them at once; what reaching the cluster raises.
    """
    host = host_of(_execution(plan))
    places = [(item, preflight.place_elsewhere(plan, item)) for item in plan.inputs]
    wanted = [(item, place) for item, place in places if place]
    if host.is_local or not wanted:
        return
    # With an empty IFS a pattern is not split into words; one without a match stays as it is.
    look = """IFS=; for p; do set -- $p; [ -e "$1" ] || { echo; continue; }
if [ -d "$1" ] && [ -z "$(ls -A -- "$1")" ]; then echo; else echo there; fi; done"""
    command = ["sh", "-c", look, "sh", *(str(place) for _, place in wanted)]
    said = host.require(command).decode().splitlines()
    raise_all(
        [
            preflight.missing_elsewhere(plan, item)
            for (item, _), found in zip(wanted, said, strict=True)
            if not found
        ]
    )


def preview(plan: JobPlan) -> dict[str, str]:
    """Return the scripts of a submission by name, with ``JOB`` for the job's id.

    Raises:
        NemotronError: ``path_unsuitable``.
    """
    shipped = files(plan, script.JOB)
    with tempfile.TemporaryDirectory(prefix="nemotron-") as name:
        executor = _executor(plan, shipped, Path(name) / "none")
        (Path(name) / "none").mkdir()
        task = task_name(plan)
        batch = load_nemo().preview(executor, job_id=script.JOB, task=task, base=Path(name))
    return {"sbatch": batch, script.LAUNCH: shipped.launch}


def submit(
    plan: JobPlan,
    shipped: SlurmFiles,
    *,
    job_id: str,
    console: Console,
    interrupts: Interrupts,
) -> Placement:
    """Hand a job to Slurm and return where it is; from the hand-over on signals are kept.

    Raises:
        NemotronError: ``submission_failed``, and what reaching the cluster raises.
    """
    execution = _execution(plan)
    host = host_of(execution)
    _drop_options_of_others()
    _prepare(host, plan)
    if plan.squash is not None and plan.image is not None:
        squash.import_image(plan, host, console)
    nemo = load_nemo()
    with tempfile.TemporaryDirectory(prefix="nemotron-") as name, _private_umask():
        source = Path(name) / "ship"
        _write(shipped, source)
        # On a login node nemo-run writes the job's directory in place; over ssh it is copied there.
        base = Path(job_root(execution)) if host.is_local else Path(name)
        base.mkdir(parents=True, exist_ok=True)
        with _secrets(plan, host, job_id, console) as pre_command:
            executor = _executor(plan, shipped, source, pre_command)
            interrupts.keep_from_now_on()
            with interrupts.blamed_for_failures():
                number = nemo.submit(executor, job_id=job_id, task=task_name(plan), base=base)
    return _placement(plan, host, job_id, number)


def host_of(execution: SlurmExecution) -> Host:
    """Return the machine on which Slurm's commands run."""
    if execution.tunnel == "local":
        return Host()
    return Host(execution.host, execution.user, execution.port, execution.identity)


def _placement(plan: JobPlan, host: Host, job_id: str, number: str) -> Placement:
    """Return where a job is that ``sbatch`` has answered with ``number``."""
    if not number.isdigit():
        raise NemotronError(
            "submission_failed",
            f"sbatch answered {number!r}; wanted a job number",
            exit_code=ExitCode.SUBMISSION,
        )
    return Placement(
        executor="slurm",
        id=number,
        name=f"{_execution(plan).job_name_prefix}{task_name(plan)}",
        directory=str(job_directory(plan, job_id)),
        host=host.name,
        user=host.user,
        port=host.port,
        identity=host.identity,
    )


def _execution(plan: JobPlan) -> SlurmExecution:
    assert isinstance(plan.execution, SlurmExecution)  # noqa: S101 - chosen by the executor
    return plan.execution


def _executor(
    plan: JobPlan, shipped: SlurmFiles, source: Path, pre_command: str | None = None
) -> Any:
    execution = _execution(plan)
    root = job_root(execution)
    if not set(root) <= set(_PLAIN):
        raise NemotronError(
            "path_unsuitable",
            f"nemo-run cannot use the directory {root!r}",
            where="run.env.remote_job_dir",
            fix="set remote_job_dir to a path of letters, digits and _ . / @ + = -",
        )
    options = executor_options(plan, shipped.prologue)
    if plan.image is None and any("/nemo_run" in str(value) for value in (root, *options.values())):
        raise NemotronError(
            "path_unsuitable",
            "without a container, nemo-run replaces /nemo_run with the job's directory",
            where="the directory of this run, remote_job_dir, setup_lines or srun_args",
            fix="avoid /nemo_run there, or set remote_job_dir to another directory",
        )
    return load_nemo().slurm_executor(
        options, source=source, job_root=root, machine=host_of(execution), pre_command=pre_command
    )


_PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./@+=-"


def executor_options(plan: JobPlan, prologue: str) -> dict[str, Any]:
    """Return the fields of nemo-run's executor.

    nemo-run quotes the directives itself, but nothing in the line that starts ``srun``.

    Raises:
        NemotronError: ``path_unsuitable``.
    """
    execution = _execution(plan)
    image = plan.squash or plan.image
    chosen = execution.batch_partition if plan.is_detached else execution.run_partition
    directives = {
        **{name: getattr(execution, name) for name in _DIRECTIVES if getattr(execution, name)},
        **execution.extra,
    }
    return {
        **{name: getattr(execution, name) for name in _SAME_NAME},
        "partition": chosen or execution.partition,
        "nodes": plan.nodes,
        "ntasks_per_node": 1,  # launch.sh; it starts the ranks
        "gpus_per_node": plan.gpus_per_node or None,
        "exclusive": execution.exclusive or None,
        "container_image": shlex.quote(image) if image else None,
        "container_mounts": _quoted_mounts(plan) if image else [],
        "container_env": _container_env(plan) if plan.image else None,
        "additional_parameters": {
            key: value for key, value in directives.items() if value is not False
        },
        "srun_args": [shlex.quote(argument) for argument in execution.srun_args],
        "setup_lines": prologue,
    }


def _quoted_mounts(plan: JobPlan) -> list[str]:
    for mount in plan.mounts:
        # pyxis splits at both. Paths in a profile cannot have them; the working directory may.
        if "," in mount or mount.count(":") > 2:
            raise NemotronError(
                "path_unsuitable",
                f"a container cannot mount {mount.partition(':')[0]!r}",
                where=f"mount {mount}",
                fix="use a directory without commas and colons in its path, or set workspace",
            )
    return [shlex.quote(mount) for mount in plan.mounts]


def _container_env(plan: JobPlan) -> list[str]:
    """Return the variables of the host that an image must not override."""
    execution = _execution(plan)
    names = ("NEMOTRON_MASTER_ADDR", "NEMOTRON_MASTER_PORT", "NEMOTRON_KEY")
    ours = names if plan.nodes > 1 else ()
    return list(dict.fromkeys((*execution.container_env, *execution.secrets, *ours)))


def _drop_options_of_others() -> None:
    """Remove Slurm's options from the environment: they would change the job.

    Inside another job there are some, such as the one core that its step is bound to. Only the
    variables that say which cluster is meant stay.
    """
    for name in [name for name in os.environ if name.startswith(_OPTIONS)]:
        if name not in _CLUSTER:
            del os.environ[name]


def _write(shipped: SlurmFiles, directory: Path) -> None:
    directory.mkdir()
    (directory / script.LAUNCH).write_text(shipped.launch, encoding="utf-8")
    (directory / script.CONFIG).write_text(shipped.config, encoding="utf-8")
    if shipped.archive is not None:
        (directory / shipped.archive.name).write_bytes(shipped.archive.content)


def _prepare(host: Host, plan: JobPlan) -> None:
    """Make the directories of a job; refuse early what cannot be reached."""
    if host.is_local:
        host.run(["sbatch", "--version"])
    else:
        host.require(["mkdir", "-p", "-m", "700", "--", job_root(_execution(plan))])
    if plan.image and f"{plan.workspace}:{plan.workspace}" in plan.mounts:
        # Otherwise launch.sh makes the workspace, but this one is mounted before launch.sh runs.
        host.require(["mkdir", "-p", "--", str(plan.workspace)])


@contextmanager
def _secrets(plan: JobPlan, host: Host, job_id: str, console: Console) -> Iterator[str | None]:
    """Yield shell code that gives a command over ssh the secrets; None if it needs none."""
    names = [name for name in plan.execution.secrets if name in os.environ]
    if host.is_local or not names:
        yield None
        return
    path = f"{job_root(_execution(plan))}/.environment-{job_id}"
    lines = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)
    quoted = shlex.quote(path)
    write = f"umask 077; set -C; cat > {quoted}"
    try:
        host.require(["sh", "-c", write], stdin=lines.encode())
        yield f"if [ -r {quoted} ]; then . {quoted}; fi"
    finally:
        _remove(host, path, console)


def _remove(host: Host, path: str, console: Console) -> None:
    try:
        host.require(["rm", "-f", "--", path])
    except NemotronError as error:
        # Not raised: Slurm may have the job by now, which must not be recorded as not submitted.
        console.say(f"{error.problem}; the file has secrets: remove {path} on {host.name} by hand")


@contextmanager
def _private_umask() -> Iterator[None]:
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
