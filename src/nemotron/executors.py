"""The schemas of profiles, one per executor; unknown keys are errors.

The keys are those of nemo-run's executors and of profiles that people already have. Values that end
up in a scheduler's directive, or in a command that nemo-run builds without quoting, are checked
here, so that what could not be passed on intact is refused before anything starts. ``setup_lines``,
``startup_commands``, ``pre_launch_commands`` and ``run_command`` are shell code by design.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, LiteralString

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def _form(pattern: str, words: LiteralString) -> AfterValidator:
    """Return a check that a whole text matches ``pattern``; ``words`` tell users what is wanted."""
    form = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if form.fullmatch(text) is None:
            raise PydanticCustomError("text_form", words)
        return text

    return AfterValidator(check)


Name = Annotated[
    str,
    _form(
        # bash's read-only variables cannot be set; those of launch.sh begin with nemotron_.
        r"(?!(BASHOPTS|BASH_VERSINFO|EUID|PPID|SHELLOPTS|UID|nemotron_.*)$)[A-Za-z_][A-Za-z0-9_]*",
        "a variable name of letters, digits and _, not read-only in bash and not nemotron_*",
    ),
]
# One line without anything that would end a quoted word early.
Line = Annotated[str, _form(r"[^\x00-\x1f\x7f'\"\\]+", "one line without quotes and backslashes")]
# pyxis separates mounts by commas.
Mount = Annotated[
    str,
    _form(r"[^\x00-\x1f\x7f'\"\\,]+", "one mount, without quotes, backslashes and commas"),
]
Text = Annotated[str, _form(r"[^\x00]*", "text without NUL characters")]
# Linux starts no program that has a variable of 128 KiB or more.
Value = Annotated[
    str, _form(r"[^\x00]{0,100000}", "text of at most 100,000 characters, without NUL")
]
# nemo-run does not quote these when it calls tools; Slurm expands % in the names of log files.
PlainPath = Annotated[
    str,
    _form(r"/[A-Za-z0-9_./@+=-]*", "an absolute path of only letters, digits and _ . / @ + = -"),
]
Directory = Annotated[
    str,
    _form(r"/[^\x00-\x1f\x7f:,'\"\\]*", "an absolute path without quotes, colons and commas"),
]
Image = Annotated[
    str, _form(r"[^\x00-\x20\x7f'\"\\,]*", "an image without spaces, quotes and commas")
]
HostName = Annotated[
    str, _form(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a name of only letters, digits and _ . -")
]
Option = Annotated[
    str, _form(r"[a-z][a-z0-9_-]*", "an sbatch option without its dashes, such as licenses")
]
KeyFile = Annotated[
    str,
    _form(
        r"(~?/)?[A-Za-z0-9_.@+=-][A-Za-z0-9_./@+=-]*",
        "a path of only letters, digits and _ . / @ + = -",
    ),
]
Time = Annotated[
    str, _form(r"(\d+-)?\d+(:\d{1,2}){0,2}", "a Slurm time, such as 04:00:00 or 1-12:00")
]


class Execution(BaseModel):
    """Keys that every executor has; a composed ``run.env`` section is one of its subclasses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    container_image: Image | None = None  # "" or null: no container
    nodes: int | None = Field(default=None, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=0)
    ntasks_per_node: int | None = Field(default=None, ge=1)
    nproc_per_node: int | None = Field(default=None, ge=1)
    env_vars: dict[Name, Value | None] = {}  # null: leave the variable out
    secrets: tuple[Name, ...] = ()
    startup_commands: tuple[Text, ...] = ()
    run_command: Text | None = None  # shell code with {command}, or {script} and {config}
    extra: dict[Option, bool | int | Line] = {}


class LocalExecution(Execution):
    """This host."""


class RemoteExecution(Execution):
    """Keys that the executors of other machines share."""

    workspace: Directory | None = None  # where the job runs; base of relative paths in the config
    code_path: Directory | None = None  # where the cluster has the package; then none is shipped


class SlurmExecution(RemoteExecution):
    """A Slurm cluster, reached from one of its login nodes or over ssh."""

    account: Line | None = None
    partition: Line | None = None
    run_partition: Line | None = None
    batch_partition: Line | None = None
    time: Time = "04:00:00"
    cpus_per_task: int | None = Field(default=None, ge=1)
    cpus_per_gpu: int | None = Field(default=None, ge=1)
    gpus_per_task: int | None = Field(default=None, ge=1)
    mem: Line | None = None
    mem_per_cpu: Line | None = None
    mem_per_gpu: Line | None = None
    exclusive: bool | Line = False
    qos: Line | None = None
    gres: Line | None = None
    constraint: Line | None = None
    nodelist: Line | None = None
    exclude: Line | None = None
    reservation: Line | None = None
    network: Line | None = None
    segment: int | None = Field(default=None, ge=1)
    comment: Line | None = None
    # With B: the signal would go to the batch shell alone, which has nothing to save.
    signal: (
        Annotated[
            str,
            _form(
                r"(R:)?[A-Z0-9]+(@\d+)?",
                "a signal such as TERM@120; a B: in front would keep it from the ranks",
            ),
        ]
        | None
    ) = None
    dependency: (
        Annotated[str, _form(r"[A-Za-z0-9:,?+_]+", "a dependency such as afterok:123")] | None
    ) = None
    requeue: bool = False  # start again by itself after exit code 75
    requeue_limit: int = Field(default=20, ge=0)
    job_name_prefix: Annotated[
        str,
        # Slurm's logs are named for the job.
        _form(
            r"[A-Za-z0-9_.+=@-]{1,100}",
            "at most 100 characters, only letters, digits and _ . + = @ -",
        ),
    ] = "nemotron-"
    srun_args: tuple[Text, ...] = ()
    container_env: tuple[Name, ...] = ()
    mounts: tuple[Mount, ...] = ()
    lustre_mount: Mount | Literal[""] | None = None
    remote_job_dir: PlainPath | None = None
    tunnel: Literal["local", "ssh"] = "local"
    host: HostName = "localhost"
    port: int | None = Field(default=None, ge=1, le=65535)
    user: HostName | None = None
    identity: KeyFile | None = None
    setup_lines: Text | None = None
    build_partition: Line | None = None
    build_time: Time | None = None
    build_include_gpus: bool = False
    build_gpus_per_node: int | None = Field(default=None, ge=0)
    build_image: str | None = None
    build_cache_dir: str | None = None

    @model_validator(mode="after")
    def _jobs_can_be_found(self) -> SlurmExecution:
        if taken := sorted({"output", "error", "array"} & self.extra.keys()):
            raise ValueError(f"extra cannot set {taken[0]}: jobs are found by where they write")
        if not str(self.extra.get("export", "ALL")).startswith("ALL"):
            raise ValueError(
                "extra cannot set export: secrets reach the job in sbatch's environment"
            )
        return self

    @model_validator(mode="after")
    def _ssh_says_where(self) -> SlurmExecution:
        if self.tunnel == "ssh" and self.remote_job_dir is None:
            raise ValueError('tunnel = "ssh" needs remote_job_dir, a directory on the cluster')
        return self


class LeptonMount(BaseModel):
    """Storage that a Lepton job sees: ``path`` of the storage ``from`` at ``mount_path``."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    path: Line
    mount_path: Directory
    source: Line | None = Field(default=None, alias="from")


class LeptonExecution(RemoteExecution):
    """A Lepton workspace."""

    nemo_run_dir: PlainPath | None = None
    nprocs_per_node: int | None = Field(default=None, ge=1)
    resource_shape: Line | None = None
    node_group: Line | None = None
    node_reservation: Line | None = None
    shared_memory_size: int | None = Field(default=None, ge=1)
    image_pull_secrets: tuple[Line, ...] = ()
    secret_vars: dict[Name, Line] = {}  # variable -> name of a secret of the workspace
    custom_spec: dict[str, Any] = {}
    pre_launch_commands: tuple[Text, ...] = ()
    mounts: tuple[LeptonMount, ...] = ()
    pip_extras: tuple[Line, ...] = ()
    can_be_preempted: bool | None = None
    can_preempt: bool | None = None
    queue_priority: Line | None = None
    launcher: str | None = None
    ray_version: str | None = None
    existing_ray_cluster: str | None = None
    repo_root: str | None = None


EXECUTORS: dict[str, type[Execution]] = {
    "local": LocalExecution,
    "slurm": SlurmExecution,
    "lepton": LeptonExecution,
}

# Keys of existing profiles that are accepted without effect; the reason is printed.
WITHOUT_EFFECT = {
    "build_image": "images are imported, not built",
    "build_cache_dir": "images are imported, not built",
    "launcher": "each step defines how it is launched",
    "nprocs_per_node": "the number of ranks follows from the config's layout",
    "ray_version": "no step runs on a Lepton Ray cluster",
    "existing_ray_cluster": "no step runs on a Lepton Ray cluster",
    "repo_root": "the installed package is shipped instead",
    "custom_spec": "nemo-run does not pass it on to Lepton",
}
