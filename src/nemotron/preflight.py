"""Checks a plan before anything starts, without torch, and reports all failures at once.

A check that cannot be decided here is *pending*: in a dry run an input that does not exist yet, on
a remote profile whatever depends on files where the job will run. A contradiction always fails.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemotron.artifacts import refuse_overlap
from nemotron.catalog import find_step, find_steps, producers_of
from nemotron.errors import ExitCode, NemotronError
from nemotron.executors import LeptonExecution, SlurmExecution
from nemotron.plan import JobPlan, PlannedInput, build
from nemotron.wildcards import fixed_part, is_there, passes_by


@dataclass(frozen=True)
class Check:
    """The result of one check; ``producer`` is the plan that will make a missing input first."""

    status: Literal["ok", "pending", "failed"]
    text: str
    error: NemotronError | None = None
    producer: JobPlan | None = None


def check(plan: JobPlan, *, dry_run: bool, ancestors: tuple[str, ...] = ()) -> list[Check]:
    """Return the results of all checks of a plan.

    Args:
        plan: The plan.
        dry_run: Whether a missing input, or an unset secret, is only pending.
        ancestors: The plans that wait for this one's output, as ``step -c config``.
    """
    results = [
        *_check_layout(plan),
        *_check_storage_and_shape(plan),
        *_check_secrets(plan, dry_run),
        *_check_overlap(plan),
        *_check_inputs(plan, dry_run, ancestors),
        *_check_step(plan),
    ]
    # A step's own checks may find the same again, with another place: it is reported once.
    once: dict[tuple[str, str], Check] = {}
    for result in results:
        once.setdefault((result.status, result.text), result)
    return list(once.values())


def failures(checks: list[Check]) -> list[NemotronError]:
    """Return the errors among the results."""
    return [result.error for result in checks if result.error is not None]


def label(plan: JobPlan) -> str:
    """Return a plan as it is named in a shell: ``data_prep/sft_packing -c tiny``."""
    path = plan.config_path
    config = str(path) if path.is_absolute() else f"./{path}"
    if path.parent == plan.step.directory / "config":
        config = path.stem
    return shlex.join([plan.step.id, "-c", config])


def _check_layout(plan: JobPlan) -> list[Check]:
    """Check ranks, nodes and image against each other."""
    found: list[Check] = []
    info = plan.step.manifest.step
    key = "nproc_per_node"
    wanted = plan.execution.nproc_per_node
    if wanted is None and plan.executor != "local" and info.launch == "torchrun":
        key, wanted = "ntasks_per_node", plan.execution.ntasks_per_node
    if plan.executor == "local":
        if (plan.execution.nodes or 1) > 1:
            problem = f"run.env.nodes is {plan.execution.nodes}; a local run has one node"
            fix = "pass run.env.nodes=1, or choose a profile with -r"
            found.append(_failed("layout_invalid", problem, "run.env.nodes", fix))
    else:
        found += _check_nodes(plan)
    is_shared = info.launch == "python" and plan.nodes > 1
    if wanted is not None and not is_shared and wanted * plan.nodes != plan.num_ranks:
        problem = (
            f"run.env.{key} is {wanted} on {plan.nodes} node(s); "
            f"the config needs {plan.num_ranks} rank(s)"
        )
        fix = f"leave {key} out, or change the parallel sizes of the config"
        found.append(_failed("layout_invalid", problem, f"run.env.{key}", fix))
    if not any(result.error for result in found):
        found.append(Check("ok", plan.layout))
    return found


def _check_nodes(plan: JobPlan) -> list[Check]:
    found: list[Check] = []
    info = plan.step.manifest.step
    gpus = plan.gpus_per_node
    is_shared = info.shares_work and plan.executor == "slurm"
    if info.launch == "python" and plan.nodes > 1 and not is_shared:
        place = " on Lepton" if info.shares_work else ""
        problem = f"{plan.step.id} runs on a single node{place}; run.env.nodes is {plan.nodes}"
        fix = "pass run.env.nodes=1"
        found.append(_failed("layout_invalid", problem, "run.env.nodes", fix))
    elif info.launch == "torchrun" and plan.num_ranks % plan.nodes:
        problem = f"{plan.num_ranks} rank(s) cannot be spread evenly over {plan.nodes} node(s)"
        fix = "choose run.env.nodes so that it divides the product of the parallel sizes"
        found.append(_failed("layout_invalid", problem, "run.env.nodes", fix))
    elif info.launch == "torchrun" and gpus and plan.nproc_per_node > gpus:
        problem = f"{plan.nproc_per_node} ranks per node do not fit on {gpus} GPU(s) per node"
        nodes = -(-plan.num_ranks // gpus)
        fix = f"pass run.env.nodes={nodes}, or lower the parallel sizes of the config"
        found.append(_failed("layout_invalid", problem, "run.env.gpus_per_node", fix))
    elif info.launch == "torchrun" and gpus and plan.nproc_per_node < gpus:
        found.append(Check("ok", f"{plan.nproc_per_node} of {gpus} GPU(s) per node are used"))
    if plan.image is None and plan.executor == "lepton":
        problem = f"no container image for {plan.step.id} on {plan.executor}"
        fix = "set container_image in the profile"
        found.append(_failed("image_missing", problem, "run.env.container_image", fix))
    return found


def _check_storage_and_shape(plan: JobPlan) -> list[Check]:
    """Check what a Lepton job needs: storage, and a shape that has the GPUs it asks for."""
    execution = plan.execution
    if not isinstance(execution, LeptonExecution):
        return []
    found: list[Check] = []
    mounted = [mount.mount_path for mount in execution.mounts]
    places = [("nemo_run_dir", execution.nemo_run_dir or "nemo-run")]
    places += [("the output", output.path) for output in plan.outputs]
    for name, path in places if mounted else ():
        assert plan.workspace is not None  # noqa: S101 - a Lepton job has one
        place = Path(os.path.normpath(plan.workspace / path))
        if not any(place.is_relative_to(target) for target in mounted):
            problem = f"{name} {place} is not on any of the mounts: {', '.join(mounted)}"
            fix = "choose a path below a mount_path of the profile"
            found.append(_failed("storage_missing", problem, "run.env.mounts", fix))
    if not mounted:
        problem = "the profile mounts no storage, which a job needs for its files and outputs"
        fix = "add mounts with path, mount_path and from, as nemotron profiles init lepton does"
        found.append(_failed("storage_missing", problem, "run.env.mounts", fix))
    if plan.gpus_per_node and not execution.resource_shape:
        problem = f"{plan.gpus_per_node} GPU(s) per node are requested, but no resource_shape"
        fix = "set resource_shape in the profile; on Lepton only the shape provides GPUs"
        found.append(_failed("shape_missing", problem, "run.env.resource_shape", fix))
    return found


def _check_secrets(plan: JobPlan, dry_run: bool) -> list[Check]:
    found: list[Check] = []
    for name in plan.execution.secrets:
        if plan.executor == "lepton":
            text = f"secret {name}: the job takes it from the workspace"
            found.append(Check("pending", text))
        elif os.environ.get(name):
            found.append(Check("ok", f"secret {name} is set"))
        elif dry_run:
            found.append(Check("pending", f"secret {name} is not set here"))
        else:
            problem = f"the profile names the secret {name}, which is not set"
            fix = f"export {name}=..., or remove it from secrets"
            found.append(_failed("secret_missing", problem, "run.env.secrets", fix))
    return found


def _check_overlap(plan: JobPlan) -> list[Check]:
    found: list[Check] = []
    for output in plan.outputs:
        inputs = {
            item.key: fixed_part(item.path)
            for item in plan.inputs
            if item.path and not passes_by(item.path, Path(output.path))
        }
        try:
            refuse_overlap(Path(output.path), inputs)
        except NemotronError as error:
            own = plan.step.manifest.error(error.code, error.problem, where=error.where)
            found.append(_refused(own or error))
    if plan.outputs and not found:
        found.append(Check("ok", "no output overlaps an input"))
    return found


def _check_inputs(plan: JobPlan, dry_run: bool, ancestors: tuple[str, ...]) -> list[Check]:
    found: list[Check] = []
    for item in plan.inputs:
        if item.path is None and not item.is_required:
            continue
        if item.path is not None and item.path.startswith("${steps:"):
            found.append(Check("ok", f"{item.type} at {item.path} is shipped with the code"))
        elif item.path is not None and "://" in item.path:
            found.append(Check("pending", f"{item.type} at {item.path}: fetched by the job"))
        elif plan.executor != "local":
            found.append(_check_elsewhere(plan, item, dry_run))
        elif item.path is not None and is_there(item.path):
            found.append(Check("ok", f"{item.type} is at {item.path}"))
        elif item.path is not None and item.producer is not None:
            found += _check_producer(plan, item, dry_run, ancestors)
        elif dry_run:
            place = f"at {item.path}" if item.path else f"({item.key} is not set)"
            found.append(Check("pending", f"{item.type} {place}: not there yet"))
        else:
            found.append(_refused(_missing(plan, item)))
    return found


def missing_elsewhere(plan: JobPlan, item: PlannedInput) -> NemotronError:
    """Return the error of an input that is not where a remote job would look for it."""
    error = _missing(plan, item)
    if item.producer is None or plan.profile is None:
        return error
    option = "-b" if plan.is_detached else "-r"
    maker = f"{item.producer.step} -c {item.producer.config} {option} {plan.profile.name}"
    problem = f"{error.problem}, in {plan.workspace}"
    return NemotronError(
        error.code,
        problem,
        where=error.where,
        why="unlike a local run, a remote run does not make missing inputs first",
        fix=f"make it first: nemotron steps run {maker}",
        exit_code=error.exit_code,
    )


def place_elsewhere(plan: JobPlan, item: PlannedInput) -> Path | None:
    """Return where the login node of a Slurm job has an input that must exist at submission.

    None if that cannot be told: on Lepton, inside an image, outside the job's workspace (which may
    be visible to compute nodes only), if this host is no login node, and if another job may make
    the input before this one starts.
    """
    execution = plan.execution
    if not isinstance(execution, SlurmExecution) or execution.dependency:
        return None
    if item.path is None or item.path.startswith("${steps:") or "://" in item.path:
        return None
    if execution.tunnel == "local" and not _is_login_node(execution):
        return None
    assert plan.workspace is not None  # noqa: S101 - a Slurm job has one
    place = Path(os.path.normpath(plan.workspace / item.path))
    if not place.is_relative_to(plan.workspace):
        return None
    if plan.image is None:
        return place
    mounts = (mount.split(":") for mount in plan.mounts)
    pairs = ((Path(source), Path(*rest[:1] or [source])) for source, *rest in mounts)
    fitting = [(to, source) for source, to in pairs if place.is_relative_to(to)]
    target, source = max(fitting, key=lambda pair: len(pair[0].parts))
    return source / place.relative_to(target)


def _is_login_node(execution: SlurmExecution) -> bool:
    """Return whether this host is a login node, from which the profile's jobs are submitted."""
    return execution.tunnel == "local" and shutil.which("sbatch") is not None


def _check_elsewhere(plan: JobPlan, item: PlannedInput, dry_run: bool) -> Check:
    """Check an input of a remote job, as far as it can be seen from this machine."""
    if item.path is None:
        error = _missing(plan, item)
        return Check("pending", error.problem) if dry_run else _refused(error)
    named = f"{item.type} at {item.path}"
    place = place_elsewhere(plan, item)
    if place is None:
        return Check("pending", f"{named}: cannot be checked from here")
    if isinstance(plan.execution, SlurmExecution) and plan.execution.tunnel == "ssh":
        host = plan.execution.host
        return Check("pending", f"{named}: checked on {host} when the job is submitted")
    if is_there(str(place)):
        return Check("ok", f"{item.type} is at {place}")
    error = missing_elsewhere(plan, item)
    if dry_run:
        return Check("pending", f"{named}: not there yet; {error.fix}")
    return _refused(error)


def _check_producer(
    plan: JobPlan, item: PlannedInput, dry_run: bool, ancestors: tuple[str, ...]
) -> list[Check]:
    """Plan the run that makes a missing input, and check that it writes where it is wanted."""
    assert item.producer is not None and item.path is not None  # noqa: S101, PT018 - caller
    waiting = (*ancestors, label(plan))
    maker = build(find_step(item.producer.step), config=item.producer.config, profile=plan.profile)
    if label(maker) in waiting:
        problem = f"the producers wait for each other: {' -> '.join((*waiting, label(maker)))}"
        where = f"{plan.config_path}: run.producers"
        return [_failed("producer_cycle", problem, where, "remove one of them")]
    wanted = fixed_part(item.path).resolve()
    made = [output for output in maker.outputs if output.type == item.type]
    if not any(wanted.is_relative_to(Path(output.path).resolve()) for output in made):
        return [_refused(_other_output(item, maker, [output.path for output in made]))]
    inner = check(maker, dry_run=dry_run, ancestors=waiting)
    broken = [result for result in inner if result.error is not None]
    text = f"{item.type} at {item.path}: produced first by {label(maker)}"
    return [Check("pending", text, producer=maker), *broken]


def _check_step(plan: JobPlan) -> list[Check]:
    """Run the step's own ``checks.py`` over the config and the inputs that exist."""
    module = plan.step.load_checks()
    if module is None:
        return []
    run: Callable[..., list[NemotronError]] = module.check
    left: list[Check] = []
    if not _has_files_of_job(plan) and hasattr(module, "check_config"):
        run = module.check_config
        text = f"checks of {plan.step.id} that read files: left to the job"
        left.append(Check("pending", text))
    try:
        errors = run(plan.config)
    except NemotronError as error:
        errors = [error]
    if not errors:
        return [Check("ok", f"checks of {plan.step.id}"), *left]
    return [*(_refused(error) for error in errors), *left]


def _has_files_of_job(plan: JobPlan) -> bool:
    """Return whether the config's paths mean the same files here and now as later to the job."""
    execution = plan.execution
    if not isinstance(execution, SlurmExecution):
        return plan.executor == "local"
    is_here = _is_login_node(execution) and plan.workspace == Path.cwd()
    return is_here and not execution.dependency


def _missing(plan: JobPlan, item: PlannedInput) -> NemotronError:
    problem = f"no {item.type} at {item.path}" if item.path else f"{item.key} is not set"
    if item.missing is not None:
        own = plan.step.manifest.error(item.missing, problem, where=item.key)
        assert own is not None  # noqa: S101 - the manifest was checked for it
        return own
    makers = producers_of(item.type, find_steps())
    run = f"run {' or '.join(makers)} first, or " if makers else ""
    return NemotronError(
        "input_missing",
        problem,
        where=item.key,
        fix=f"{run}pass {item.key}=PATH",
        exit_code=ExitCode.PREFLIGHT,
    )


def _other_output(item: PlannedInput, maker: JobPlan, made: list[str]) -> NemotronError:
    key = next((output.key for output in maker.outputs if output.type == item.type), "output")
    command = f"{label(maker)} {shlex.quote(f'{key}={item.path}')}"
    instead = shlex.quote(f"{item.key}={made[0] if made else 'PATH'}")
    return NemotronError(
        "producer_output_differs",
        f"no {item.type} at {item.path}; {label(maker)} writes to {', '.join(made) or 'nowhere'}",
        where=item.key,
        fix=f"nemotron steps run {command}, or pass {instead}",
        exit_code=ExitCode.PREFLIGHT,
    )


def _failed(code: str, problem: str, where: str, fix: str) -> Check:
    return _refused(
        NemotronError(code, problem, where=where, fix=fix, exit_code=ExitCode.PREFLIGHT)
    )


def _refused(error: NemotronError) -> Check:
    return Check("failed", error.problem, error)
