"""Lepton: makes a job of a workspace from a plan, and submits it through nemo-run.

``launch.sh`` and the config reach the workspace's storage through a helper job of nemo-run, which
has them in its command line. The code archive comes in environment variables of the job itself,
because one argument of a program can hold no more than 128 KiB. Secrets are named; their values are
in the workspace.
"""

from __future__ import annotations

import base64
import io
import re
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from nemotron.errors import ExitCode, NemotronError, raise_all
from nemotron.executors import LeptonExecution
from nemotron.jobs import Placement
from nemotron.launch import lepton_jobs, script
from nemotron.launch.archive import Archive, pack_code
from nemotron.launch.base import Console
from nemotron.launch.lazy import load_nemo
from nemotron.launch.signals import Interrupts
from nemotron.plan import JobPlan

_CHUNK_CHARACTERS = 96 * 1024
# The whole job must fit into one object of the workspace's Kubernetes, 1.5 MiB.
_MOST_CODE_CHARACTERS = 1024 * 1024
# An argument of a program ends at 128 KiB; nemo-run adds the paths.
_MOST_FILE_CHARACTERS = 120 * 1024
_EXAMPLES = "steps/_tiny"
_MOVER_TRIES = 5


@dataclass(frozen=True)
class LeptonFiles:
    """What a job ships."""

    launch: str
    config: str
    chunks: tuple[str, ...]
    archive: Archive | None


def files(plan: JobPlan, job_id: str) -> LeptonFiles:
    """Return everything of ours that a job consists of.

    Raises:
        NemotronError: ``code_too_large``, ``config_too_large``: it does not reach the job this way;
            ``unknown_key``.
    """
    execution = _execution(plan)
    _check_extra(execution)
    config = plan.config_text
    archive, chunks = None, ()
    if execution.code_path is None:
        needs_examples = f"${{{_EXAMPLES.replace('/', ':')}" in config
        archive = pack_code(left_out=() if needs_examples else (_EXAMPLES,))
        chunks = _chunks(archive)
    launch = script.launch_script(
        plan,
        job_id=job_id,
        archive=archive.name if archive else None,
        chunks=len(chunks),
    )
    _check_size(launch, config)
    return LeptonFiles(launch=launch, config=config, chunks=chunks, archive=archive)


def require_inputs(plan: JobPlan) -> None:
    """Do nothing: only jobs see the storage of a workspace, so the job looks for its inputs."""


def preview(plan: JobPlan) -> dict[str, str]:
    """Return the job's script, and the fields of nemo-run's executor without values of secrets."""
    shipped = files(plan, script.JOB)
    options = _options(plan, shipped)
    options["env_vars"] = sorted(options["env_vars"])
    text = yaml.safe_dump(options, sort_keys=False)
    return {"LeptonExecutor": text, script.LAUNCH: shipped.launch}


def submit(
    plan: JobPlan,
    shipped: LeptonFiles,
    *,
    job_id: str,
    console: Console,
    interrupts: Interrupts,
) -> Placement:
    """Hand a job to the workspace and return where it is; from the hand-over on signals are kept.

    Raises:
        NemotronError: ``submission_failed``, ``workspace_refused``.
    """
    lepton_jobs.require_node_group(_execution(plan))
    console.say(
        "sending the job's files through a helper job; Ctrl-C waits for it, a second one does not"
    )
    name = job_name(job_id)
    nemo = load_nemo()
    interrupts.keep_from_now_on()
    try:
        number = _submit_in_turn(nemo, plan, shipped, job_id, name)
    except NemotronError as error:
        number = _taken_after_all(name, error)
    directory = f"{_nemo_run_dir(plan)}/experiments/nemotron/nemotron_{job_id}"
    return Placement(
        executor="lepton", id=number.rpartition("___")[2], name=name, directory=directory
    )


def _submit_in_turn(
    nemo: ModuleType, plan: JobPlan, shipped: LeptonFiles, job_id: str, name: str
) -> str:
    """Submit; try again if another submission in the same second holds nemo-run's helper job."""
    for attempt in range(1, _MOVER_TRIES):
        try:
            return _submit_once(nemo, plan, shipped, job_id, name)
        except NemotronError as error:
            # nemo-run names its helper job by the second.
            if "409" not in error.problem or "data-mover" not in error.problem:
                raise
            time.sleep(attempt)
    return _submit_once(nemo, plan, shipped, job_id, name)


def _taken_after_all(name: str, refused: NemotronError) -> str:
    """Return the id of a job that was taken although its submission failed: the answer was lost.

    Raises:
        NemotronError: ``refused``, with a note if the workspace cannot be asked for the job.
    """
    try:
        if lepton_jobs.has_job(name):
            return name
    except NemotronError as error:
        problem = f"{refused.problem}; whether job {name} exists is not known either: "
        raise NemotronError(
            refused.code,
            problem + error.problem,
            fix=f"look for {name} in the workspace before you submit again",
            exit_code=refused.exit_code,
        ) from None
    raise refused


def job_name(job_id: str) -> str:
    """Return a name as Lepton takes it: at most 34 of a-z, 0-9 and -, a letter first."""
    day, clock, *slug, random = job_id.split("-")
    words = re.sub(r"[^a-z0-9-]", "", "-".join(slug))[:10].strip("-")
    return f"n-{words}-{day[4:]}{clock}-{random}"


def _submit_once(
    nemo: ModuleType, plan: JobPlan, shipped: LeptonFiles, job_id: str, name: str
) -> str:
    with tempfile.TemporaryDirectory(prefix="nemotron-") as base:
        source = Path(base) / "ship"
        source.mkdir()
        (source / script.LAUNCH).write_text(shipped.launch, encoding="utf-8")
        (source / script.CONFIG).write_text(shipped.config, encoding="utf-8")
        executor = nemo.lepton_executor(
            _options(plan, shipped), source=source, open_client=lepton_jobs.open_client
        )
        return nemo.submit(executor, job_id=job_id, task=name, base=Path(base))


def _execution(plan: JobPlan) -> LeptonExecution:
    assert isinstance(plan.execution, LeptonExecution)  # noqa: S101 - chosen by the executor
    return plan.execution


def _nemo_run_dir(plan: JobPlan) -> str:
    return _execution(plan).nemo_run_dir or f"{plan.workspace}/nemo-run"


def _check_extra(execution: LeptonExecution) -> None:
    """Refuse keys of ``extra`` that nemo-run's executor lacks, or that have a key of their own."""
    if not execution.extra:
        return
    known = load_nemo().lepton_fields()
    raise_all(
        [
            NemotronError(
                "unknown_key",
                f"{name} is not a field of nemo-run's Lepton executor, or has a key of its own",
                where=f"run.env.extra.{name}",
                fix=f"extra takes: {', '.join(sorted(known))}; set other keys outside extra",
            )
            for name in execution.extra
            if name not in known
        ]
    )


def _options(plan: JobPlan, shipped: LeptonFiles) -> dict[str, Any]:
    """Return the fields of nemo-run's executor."""
    execution = _execution(plan)
    chunks = {f"NEMOTRON_CODE_{index}": text for index, text in enumerate(shipped.chunks)}
    options = {
        "container_image": plan.image,
        "nemo_run_dir": _nemo_run_dir(plan),
        "nodes": plan.nodes,
        "gpus_per_node": plan.gpus_per_node,
        "shared_memory_size": execution.shared_memory_size,
        "resource_shape": execution.resource_shape,
        "node_group": execution.node_group,
        "node_reservation": execution.node_reservation,
        "secret_vars": {name: name for name in execution.secrets} | execution.secret_vars,
        "mounts": [mount.model_dump(by_alias=True) for mount in execution.mounts],
        "image_pull_secrets": list(execution.image_pull_secrets),
        "pre_launch_commands": list(execution.pre_launch_commands),
        "can_be_preempted": execution.can_be_preempted,
        "can_preempt": execution.can_preempt,
        "queue_priority": execution.queue_priority,
        "env_vars": chunks,
        **execution.extra,
    }
    return {key: value for key, value in options.items() if value is not None}


def _chunks(archive: Archive) -> tuple[str, ...]:
    text = base64.b64encode(archive.content).decode("ascii")
    if len(text) > _MOST_CODE_CHARACTERS:
        raise NemotronError(
            "code_too_large",
            f"the code is {len(text):,} characters packed; "
            f"a Lepton job takes at most {_MOST_CODE_CHARACTERS:,}",
            where="${steps:...} of the config" if len(text) > 2 * _MOST_CODE_CHARACTERS else "",
            why="it is part of the job itself, and so is the example model of -c tiny",
            fix="put the package on the mounted storage and set code_path in the profile, "
            "or point the config at files of that storage",
            exit_code=ExitCode.PREFLIGHT,
        )
    starts = range(0, len(text), _CHUNK_CHARACTERS)
    return tuple(text[start : start + _CHUNK_CHARACTERS] for start in starts)


def _check_size(*texts: str) -> None:
    """Refuse files that are too long for the command line of nemo-run's helper job."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for index, text in enumerate(texts):
            content = text.encode()
            entry = tarfile.TarInfo(str(index))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    size = len(base64.b64encode(packed.getvalue()))
    if size > _MOST_FILE_CHARACTERS:
        raise NemotronError(
            "config_too_large",
            f"config and script are {size:,} characters packed; "
            f"a Lepton job takes at most {_MOST_FILE_CHARACTERS:,}",
            fix="move long values into a file on the mounted storage and pass its path",
            exit_code=ExitCode.PREFLIGHT,
        )
