"""The plan of a run: a step, a config, a profile and arguments become one frozen ``JobPlan``.

Nothing is written. ``--dry-run`` prints exactly this plan, and a real run executes exactly this
plan.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemotron.catalog import DEFAULT_CONFIG, Step, find_config
from nemotron.compose import InputMaker, compose
from nemotron.config import dump
from nemotron.executors import Execution, LeptonExecution, SlurmExecution
from nemotron.processes import available_cores
from nemotron.profile import Profile
from nemotron.tree import Node, dotted, for_json, leaves

# Placeholder for the job's directory, which has a name only once the job has been created.
JOB_DIRECTORY = ".nemotron/jobs/<job>"


@dataclass(frozen=True)
class PlannedInput:
    """An artifact that the step reads; ``path`` is None where no key names it."""

    type: str
    key: str
    path: str | None
    is_required: bool
    missing: str | None
    producer: InputMaker | None


@dataclass(frozen=True)
class PlannedOutput:
    """An artifact that the step writes."""

    type: str
    key: str
    path: str


@dataclass(frozen=True)
class Origin:
    """Where a value was written, and where the value that it replaced was written, if any."""

    place: str
    overrides: str


@dataclass(frozen=True)
class JobPlan:
    """Everything that a run needs to know; nothing is decided after this."""

    step: Step
    config_path: Path
    config: BaseModel
    values: dict[str, Any]
    origins: dict[str, Origin]
    executor: str
    profile: Profile | None
    is_detached: bool
    execution: Execution
    nodes: int
    num_ranks: int
    image: str | None
    squash: str | None
    is_squash_forced: bool
    workspace: Path | None
    mounts: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: dict[str, str]
    inputs: tuple[PlannedInput, ...]
    outputs: tuple[PlannedOutput, ...]
    notes: tuple[str, ...]

    @property
    def nproc_per_node(self) -> int:
        """Processes on each node."""
        return -(-self.num_ranks // self.nodes)

    @property
    def gpus_per_node(self) -> int:
        """GPUs to ask for on each node: what the profile says, otherwise what the step says."""
        asked = self.execution.gpus_per_node
        return self.step.manifest.step.gpus_per_node if asked is None else asked

    @property
    def layout(self) -> str:
        """The number of processes and nodes, in words."""
        if self.step.manifest.step.launch == "python" and self.nodes > 1:
            return f"one run shared by {self.nodes} nodes"
        return f"{self.num_ranks} rank(s) on {self.nodes} node(s)"

    def command(self, directory: str = JOB_DIRECTORY) -> list[str]:
        """Return the exact command of the job whose directory is ``directory``."""
        command = list(self.arguments)
        # The first --config is ours; one in what the user passed after -- stays as it is.
        command[command.index("--config") + 1] = f"{directory}/train.yaml"
        if self.executor != "local" or not self.execution.startup_commands:
            return command
        # The commands and the job share one shell, so that what they export reaches the job.
        script = "\n".join(["set -euo pipefail", *self.execution.startup_commands, 'exec "$@"'])
        return ["bash", "-c", script, "bash", *command]

    @property
    def config_data(self) -> dict[str, Any]:
        """The config as JSON, where infinity is the text that a config accepts for it."""
        return for_json(self.values)

    @property
    def config_text(self) -> str:
        """The config as the job reads it."""
        return dump(self.values, keep_steps=self.executor != "local")


def build(
    step: Step,
    *,
    config: str = DEFAULT_CONFIG,
    overrides: Sequence[str] = (),
    profile: Profile | None = None,
    is_detached: bool = False,
    force_squash: bool = False,
    passthrough: Sequence[str] = (),
) -> JobPlan:
    """Return the plan of one run.

    Args:
        step: The step to run.
        config: Name of one of its configs, or a path.
        overrides: ``key=value`` arguments.
        profile: Where to run; None for this host.
        is_detached: Return once the job has started.
        force_squash: Import the container image again.
        passthrough: Arguments for the run module, verbatim.

    Raises:
        NemotronError: Whatever is wrong in the config, the profile or the arguments, all at once.
    """
    path = find_config(step, config)
    executor = profile.executor if profile else "local"
    composed = compose(step, path, overrides, profile)
    execution, values = composed.execution, composed.values
    num_ranks = _num_ranks(step, composed.config)
    nodes = 1 if executor == "local" else execution.nodes or step.manifest.step.nodes
    image = _image(step, execution, executor)
    squash, squash_note = _squash(execution, image, force_squash)
    workspace = _workspace(execution)
    return JobPlan(
        step=step,
        config_path=path,
        config=composed.config,
        values=values,
        origins=_origins(composed.tree),
        executor=executor,
        profile=profile,
        is_detached=is_detached,
        execution=execution,
        nodes=nodes,
        num_ranks=num_ranks,
        image=image,
        squash=squash,
        is_squash_forced=force_squash and squash is not None,
        workspace=workspace,
        mounts=_mounts(execution, workspace),
        arguments=(*_start(step, executor, nodes, num_ranks), *passthrough),
        environment=_environment(execution, executor, num_ranks),
        inputs=_inputs(step, values, composed.producers),
        outputs=_outputs(step, values),
        notes=(*squash_note, *composed.notes),
    )


def _num_ranks(step: Step, config: BaseModel) -> int:
    """Return the processes of a job: the parallel sizes of its config say how many there are."""
    if step.manifest.step.launch != "torchrun":
        return 1
    return int(getattr(config, "num_ranks", 1))


def _origins(tree: Node) -> dict[str, Origin]:
    return {dotted(path): Origin(node.place, node.overrides) for path, node in leaves(tree)}


def _start(step: Step, executor: str, nodes: int, num_ranks: int) -> list[str]:
    """Return the command that starts the run module on its config."""
    module = f"{step.module}.step"
    config = ["--config", f"{JOB_DIRECTORY}/train.yaml"]
    python = sys.executable if executor == "local" else "python"
    if step.manifest.step.launch == "python":
        return [python, "-m", module, *config]
    # On one node, the address is given: torchrun may spend minutes on resolving its own host name.
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    layout = alone if nodes == 1 else [f"--nnodes={nodes}"]
    layout += ["--nproc-per-node", str(-(-num_ranks // nodes))]
    return [python, "-m", "nemotron.steps._torchrun", *layout, "-m", module, *config]


def _environment(execution: Execution, executor: str, num_ranks: int) -> dict[str, str]:
    """Return the variables that the job gets on top of the environment it starts in."""
    variables = {name: value for name, value in execution.env_vars.items() if value is not None}
    if executor == "local" and "OMP_NUM_THREADS" not in {**os.environ, **variables}:
        # Otherwise torch would start a thread per core in every rank.
        variables["OMP_NUM_THREADS"] = str(max(1, available_cores() // num_ranks))
    return variables


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _inputs(
    step: Step, values: Mapping[str, Any], producers: Mapping[str, InputMaker]
) -> tuple[PlannedInput, ...]:
    planned = []
    for consumed in step.manifest.consumes:
        named = [(key, _value_at(values, key)) for key in consumed.keys]
        key, path = next(
            ((key, value) for key, value in named if isinstance(value, str) and value),
            (consumed.keys[0] if consumed.keys else "", None),
        )
        planned.append(
            PlannedInput(
                type=consumed.type,
                key=key,
                path=path,
                is_required=consumed.required,
                missing=consumed.missing,
                producer=producers.get(consumed.type),
            )
        )
    return tuple(planned)


def _outputs(step: Step, values: Mapping[str, Any]) -> tuple[PlannedOutput, ...]:
    return tuple(
        PlannedOutput(produced.type, key, path)
        for produced in step.manifest.produces
        for key in produced.keys
        if isinstance(path := _value_at(values, key), str) and path
    )


def _image(step: Step, execution: Execution, executor: str) -> str | None:
    if executor == "local":
        return None
    if "container_image" in execution.model_fields_set:
        return execution.container_image or None
    return step.manifest.step.image


def _workspace(execution: Execution) -> Path | None:
    """Return the directory that a remote job runs in: relative paths of its config start there."""
    if isinstance(execution, SlurmExecution):
        if execution.workspace is None and execution.tunnel == "local":
            return Path.cwd()
        return Path(execution.workspace or f"{execution.remote_job_dir}/workspace")
    if isinstance(execution, LeptonExecution):
        mounted = execution.mounts[0].mount_path if execution.mounts else "/tmp"  # noqa: S108 - in a container
        return Path(execution.workspace or mounted)
    return None


def _mounts(execution: Execution, workspace: Path | None) -> tuple[str, ...]:
    if isinstance(execution, SlurmExecution):
        extra = (execution.lustre_mount,) if execution.lustre_mount else ()
        mounts = execution.mounts + extra
        targets = [Path(mount.split(":")[1 if ":" in mount else 0]) for mount in mounts]
        if not any(workspace and workspace.is_relative_to(target) for target in targets):
            mounts += (f"{workspace}:{workspace}",)
        return mounts
    if isinstance(execution, LeptonExecution):
        return tuple(f"{mount.path}:{mount.mount_path}" for mount in execution.mounts)
    return ()


def _squash(
    execution: Execution, image: str | None, force: bool
) -> tuple[str | None, tuple[str, ...]]:
    """Return the file that the image is imported to, or None, and notes on ``--force-squash``."""
    directory = execution.remote_job_dir if isinstance(execution, SlurmExecution) else None
    is_file = image is not None and (image.endswith(".sqsh") or image.startswith("/"))
    if directory is None or image is None or is_file:
        reason = "no container image is imported for this run"
        return None, (f"--force-squash has no effect: {reason}",) if force else ()
    name = re.sub(r"[^A-Za-z0-9]+", "_", image).strip("_")
    # Two images may come to the same name: the digest keeps their files apart.
    digest = hashlib.sha256(image.encode()).hexdigest()[:8]
    path = f"{directory}/{name}_{digest}.sqsh"
    return path, (f"--force-squash: {path} is imported again",) if force else ()
