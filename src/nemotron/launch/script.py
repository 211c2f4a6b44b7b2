"""All the shell code of a remote job: ``launch.sh``, and what Slurm's batch shell does around it.

The text follows from the plan alone, so that ``--dry-run`` shows what a submission uses. Every
value is quoted; what a profile gives as shell code (``startup_commands``, ``setup_lines``,
``run_command``) stays code. The ranks need no service to meet: the first node of the job is rank 0
and keeps the store (torchrun's static rendezvous), at a port derived from the job's number.
"""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import PurePosixPath

from nemotron.errors import ExitCode
from nemotron.executors import Execution, LeptonExecution, RemoteExecution, SlurmExecution
from nemotron.plan import JOB_DIRECTORY, JobPlan

LAUNCH, CONFIG = "launch.sh", "train.yaml"
# Stands for the job's id in a preview; safe in a path, so that nothing is quoted otherwise.
JOB = "JOB"
# The first line of ours in the batch shell's output; above it is the trace of nemo-run's script.
BATCH_MARK = "nemotron: job"
# The last lines that a node of a Lepton job prints: the error of its step, and its exit code.
END_MARK, ERROR_MARK = "nemotron: exit", "nemotron: error "
# Variables that hold a node's number, the address and port of rank 0, and the number of restarts.
_PLACES = {
    "slurm": (
        "SLURM_NODEID",
        "NEMOTRON_MASTER_ADDR",
        "NEMOTRON_MASTER_PORT",
        "SLURM_RESTART_COUNT",
    ),
    "lepton": ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "LEPTON_RESTART_COUNT"),
}

# Signals that end a shell without a trap for them; bash would then run its EXIT trap with code 0.
_FATAL = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
# Signals that ask a job to stop. A shell reports 128 + N for a command that signal N killed.
_STOP = (signal.SIGTERM, signal.SIGUSR1)
_PYTHONPATH = 'export PYTHONPATH="$nemotron_package${PYTHONPATH:+:$PYTHONPATH}"'
_SILENT_FAILURE = (
    "# It failed before the step was imported: a step reports its own errors.",
    'if [ "$nemotron_code" -eq 1 ] && [ ! -s "$NEMOTRON_ERROR_FILE" ]; then',
    "    python -m nemotron.packages || nemotron_code=$?",
    "fi",
)
_LAST_WORDS = (
    'if [ -s "$NEMOTRON_ERROR_FILE" ]; then',
    f"    printf '{ERROR_MARK}%s\\n' \"$(tr -d '\\n' < \"$NEMOTRON_ERROR_FILE\")\"",
    "fi",
    f'echo "{END_MARK} $nemotron_code"',
)


def launch_script(plan: JobPlan, *, job_id: str, archive: str | None, chunks: int = 0) -> str:
    """Return ``launch.sh``, which runs once on each node of the job.

    Args:
        plan: The plan.
        job_id: Id of the job.
        archive: File name of the code archive beside the script; None where ``code_path`` is set.
        chunks: The archive comes as this many environment variables instead of as a file.
    """
    node, address, port, restart = _PLACES[plan.executor]
    parts = [
        "#!/usr/bin/env bash",
        f"# {plan.step.id}, job {job_id}. Runs once on each node.",
        "set -euo pipefail",
        'nemotron_here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"',
        f'nemotron_node="${{{node}:-0}}" nemotron_restart="${{{restart}:-0}}"',
        *_environment(plan, job_id),
        *_code(plan.execution, job_id, archive, chunks),
        *_rendezvous(plan, address, port),
        *_enter(plan),
        *plan.execution.startup_commands,
        *_threads(plan.nproc_per_node),
        *_run(plan),
        *(_LAST_WORDS if plan.executor == "lepton" else ()),
        'exit "$nemotron_code"',
    ]
    return "\n".join(parts) + "\n"


def batch_prologue(plan: JobPlan, *, job_id: str, directory: PurePosixPath) -> str:
    """Return what the batch shell of a Slurm job does before and after the nodes run.

    Args:
        plan: The plan.
        job_id: Id of the job.
        directory: The directory of ``launch.sh``, as the batch shell sees it.
    """
    execution = plan.execution
    assert isinstance(execution, SlurmExecution)  # noqa: S101 - a Slurm plan
    limit = execution.requeue_limit if execution.requeue else 0
    lines = [
        "{ set +vx; } 2>/dev/null",
        f"echo {shlex.quote(f'{BATCH_MARK} {job_id}')}",
        # nemo-run sets it; tasks would have a terminal, and write progress for one into the log.
        "unset SLURM_UNBUFFEREDIO",
        # The one task of a node starts all ranks; srun would bind it to what a task of one core
        # gets, and since Slurm 22.05 it does not know what sbatch was asked for.
        "export SLURM_CPU_BIND=none",
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then',
        '    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
        "fi",
        f"nemotron_dir={shlex.quote(str(directory))}",
        'nemotron_restart="${SLURM_RESTART_COUNT:-0}" nemotron_told=',
        *_leave_end(limit),
    ]
    if plan.nodes > 1:
        lines += [
            'NEMOTRON_MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "NEMOTRON_MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            # What nodes of this job know one another by; it is in no file.
            "NEMOTRON_KEY=\"$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')\"",
            "export NEMOTRON_MASTER_ADDR NEMOTRON_MASTER_PORT NEMOTRON_KEY",
        ]
    return "\n".join([*lines, *([execution.setup_lines] if execution.setup_lines else [])])


def _leave_end(limit: int) -> list[str]:
    """Return the lines that write the job's end, or queue it again up to ``limit`` times."""
    return [
        "nemotron_tell() {",
        "    nemotron_told=$1",
        # A trap waits for the command's end; how srun ended is how the job ended.
        '    [ "${BASH_COMMAND%% *}" = srun ] || exit "$1"',
        "}",
        "nemotron_end() {",
        "    nemotron_code=$?",
        f"    trap '' {' '.join(number.name[3:] for number in _FATAL)}",
        '    nemotron_stopped="$nemotron_dir/stopped.$nemotron_restart"',
        '    if [ -e "$nemotron_stopped" ] && [ "$nemotron_code" -eq 0 ]; then',
        f"        nemotron_code={int(ExitCode.PREEMPTED)}",
        f'        if [ -z "$nemotron_told" ] && [ "$nemotron_restart" -lt {limit} ]; then',
        "            echo 'nemotron: stopped and saved; requeued'",
        '            scontrol requeue "$SLURM_JOB_ID" && exit 0',
        "        fi",
        "    fi",
        '    echo "$nemotron_code" > "$nemotron_dir/exit.$nemotron_restart"',
        '    exit "$nemotron_code"',
        "}",
        "trap nemotron_end EXIT",
        *(f"trap 'nemotron_tell {128 + number}' {number.name[3:]}" for number in _FATAL),
    ]


def _environment(plan: JobPlan, job_id: str) -> list[str]:
    """Return the lines that export what the job reads from its environment."""
    return [
        'export NEMOTRON_ERROR_FILE="$nemotron_here/error.$nemotron_restart.json"',
        f"export NEMOTRON_JOB={shlex.quote(job_id)}",
        # So that a rank which sees no GPU fails instead of computing on the CPU.
        f"export NEMOTRON_GPUS_PER_NODE={plan.gpus_per_node}",
        *(
            f"export {name}={shlex.quote(value)}"
            for name, value in sorted(plan.environment.items())
        ),
    ]


def _run(plan: JobPlan) -> list[str]:
    """Return the lines that run the step and set ``nemotron_code`` to how it ended."""
    return [
        "set +e",
        "# The ranks are told to stop as well; this shell waits for them to end.",
        "nemotron_told=",
        *(f"trap nemotron_told={128 + number} {number.name[3:]}" for number in _STOP),
        "trap : INT",
        _run_line(plan),
        "nemotron_code=$?",
        *(() if plan.execution.run_command else _SILENT_FAILURE),
        "# A process that the signal to stop has killed was not yet listening.",
        f'if [ "$nemotron_code" -eq {int(ExitCode.PREEMPTED)} ] ||',
        '    [ "$nemotron_code" = "$nemotron_told" ]; then',
        "    # Not a failure: that would end the other nodes before they have stopped too.",
        f'    : > "$nemotron_here/stopped.$nemotron_restart"; nemotron_code={_stopped_code(plan)}',
        "fi",
    ]


def _code(execution: Execution, job_id: str, archive: str | None, chunks: int) -> list[str]:
    """Return the lines that put the package nemotron before all others."""
    assert isinstance(execution, RemoteExecution)  # noqa: S101 - a plan for another machine
    if execution.code_path:
        where = shlex.quote(execution.code_path)
        return [f"nemotron_package={where}", _PYTHONPATH]
    lines = [
        f'nemotron_package="${{TMPDIR:-/tmp}}"/{shlex.quote(f"nemotron-{job_id}")}".$nemotron_node"',
        'rm -rf -- "$nemotron_package" && mkdir -m 700 -- "$nemotron_package"',
        "trap 'rm -rf -- \"$nemotron_package\"' EXIT",
    ]
    if chunks:
        names = [f"NEMOTRON_CODE_{index}" for index in range(chunks)]
        joined = "".join(f"${{{name}}}" for name in names)
        lines += [
            f'printf %s "{joined}" | base64 -d | tar -xzf - -C "$nemotron_package"',
            f"unset {' '.join(names)}",
        ]
    else:
        lines.append(
            f'tar -xzf "$nemotron_here"/{shlex.quote(archive or "")} -C "$nemotron_package"'
        )
    return [*lines, _PYTHONPATH]


def _rendezvous(plan: JobPlan, address: str, port: str) -> list[str]:
    if plan.nodes == 1:
        return []
    if plan.step.manifest.step.launch == "python":
        return [
            f'export NEMOTRON_NODES={plan.nodes} NEMOTRON_NODE="$nemotron_node"',
            'export NEMOTRON_START="$nemotron_restart"',
        ]
    return [
        'export PET_RDZV_BACKEND=static PET_NODE_RANK="$nemotron_node"',
        f'export PET_MASTER_ADDR="${address}"',
        f'export PET_MASTER_PORT="${port}" MASTER_ADDR="${address}" MASTER_PORT="${port}"',
    ]


def _enter(plan: JobPlan) -> list[str]:
    workspace = shlex.quote(str(plan.workspace))
    lines = [f"mkdir -p -- {workspace}", f"cd -- {workspace}"]
    if isinstance(plan.execution, LeptonExecution) and plan.execution.pip_extras:
        packages = shlex.join(plan.execution.pip_extras)
        lines.append(f"python -m pip install --quiet -- {packages}")
    return lines


def _threads(num_ranks: int) -> list[str]:
    """Return the lines that share the cores of the node among its ranks, as a local run does."""
    return [
        'if [ -z "${OMP_NUM_THREADS:-}" ]; then',
        '    nemotron_cores="$(nproc)"',
        f"    OMP_NUM_THREADS=$((nemotron_cores > {num_ranks} ? nemotron_cores / {num_ranks} : 1))",
        "fi",
        "export OMP_NUM_THREADS",
    ]


def _run_line(plan: JobPlan) -> str:
    """Return the command of the step, or the profile's ``run_command`` filled in."""
    config = f'"$nemotron_here"/{CONFIG}'
    words = [
        config if word == f"{JOB_DIRECTORY}/{CONFIG}" else shlex.quote(word)
        for word in plan.arguments
    ]
    command = " ".join(words)
    template = plan.execution.run_command
    if template is None:
        return command
    module = f"nemotron/steps/{plan.step.id}/step.py"
    values = {"command": command, "config": config, "script": f'"$nemotron_package"/{module}'}
    # In one pass: an argument of the job may itself contain {config}.
    return re.sub(r"\{(command|config|script)\}", lambda found: values[found[1]], template)


def _stopped_code(plan: JobPlan) -> int:
    # Slurm's batch shell finds the file and says 75; Lepton has no shell above this one.
    return 0 if plan.executor == "slurm" else int(ExitCode.PREEMPTED)
