"""Imports container images as squashfs files on the cluster, once for all later jobs."""

from __future__ import annotations

import shlex

from nemotron.errors import ExitCode, NemotronError
from nemotron.executors import SlurmExecution
from nemotron.launch.base import Console
from nemotron.launch.host import Host
from nemotron.plan import JobPlan

_IMPORT_TIME = "01:00:00"
_IMPORT_SECONDS = 4 * 3600  # with the wait for a node


def import_image(plan: JobPlan, host: Host, console: Console) -> None:
    """Make sure that the plan's squashfs file exists.

    A node of the build partition imports it under a lock, writes it aside and renames it when it is
    complete. So a killed import leaves no file that looks complete, and with ``--force-squash`` the
    earlier file stays in use until the new one is complete.

    Raises:
        NemotronError: ``squash_failed``.
    """
    assert plan.squash is not None and plan.image is not None  # noqa: S101, PT018 - caller
    is_there = host.run(["test", "-s", plan.squash]).returncode == 0
    if is_there and not plan.is_squash_forced:
        return
    console.say(f"importing {plan.image} to {plan.squash}")
    command = [*_srun(plan), "bash", "-c", _script(plan.image, plan.squash, plan.is_squash_forced)]
    done = host.run(command, timeout=_IMPORT_SECONDS)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-1000:]
        raise NemotronError(
            "squash_failed",
            f"{plan.image} could not be imported: {said}",
            where=plan.squash,
            fix="check the image's name and the registry's credentials (enroot's .credentials)",
            exit_code=ExitCode.SUBMISSION,
        )


def registry_uri(image: str) -> str:
    """Return an image's name as enroot writes it: the registry ends with ``#``."""
    scheme, found, rest = image.rpartition("://")
    scheme = scheme if found else "docker"
    first, slash, path = rest.partition("/")
    has_registry = slash and ("." in first or ":" in first or first == "localhost")
    if scheme == "docker" and has_registry and "#" not in rest:
        rest = f"{first}#{path}"
    return f"{scheme}://{rest}"


def _time(execution: SlurmExecution) -> str:
    """Return the time limit to ask for; on the job's own partition at most that of the job."""
    if execution.build_time is not None:
        return execution.build_time
    # The limits of another partition are not known; 0 stands for no limit.
    longest = _seconds(execution.time) if execution.build_partition is None else 0
    return execution.time if 0 < longest < _seconds(_IMPORT_TIME) else _IMPORT_TIME


def _seconds(time: str) -> int:
    """Return the seconds of one of Slurm's times: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _srun(plan: JobPlan) -> list[str]:
    execution = plan.execution
    assert isinstance(execution, SlurmExecution)  # noqa: S101 - a Slurm plan
    partition = execution.build_partition or execution.run_partition or execution.partition
    gpus = execution.build_gpus_per_node or execution.gpus_per_node
    options = {
        "account": execution.account,
        "partition": partition,
        "time": _time(execution),
        "gpus-per-node": gpus if execution.build_include_gpus else None,
    }
    if execution.build_partition is None:  # whose nodes may have none of these
        names = ("qos", "reservation", "constraint")
        options |= {name: getattr(execution, name) for name in names}
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["srun", "--nodes=1", "--ntasks=1", "--job-name=nemotron-squash", "--quiet", *given]


def _script(image: str, path: str, is_forced: bool) -> str:
    final, uri = shlex.quote(path), shlex.quote(registry_uri(image))
    skip = "" if is_forced else f"if [ -s {final} ]; then exit 0; fi\n"
    return f"""set -euo pipefail
umask 077
final={final}
mkdir -p -- "$(dirname -- "$final")"
exec 9> "$final.lock"
flock 9
{skip}aside="$final.partial.$$"
caches="$(mktemp -d)"
trap 'rm -rf -- "$aside" "$caches"' EXIT
export ENROOT_CACHE_PATH="$caches/cache" ENROOT_DATA_PATH="$caches/data"
export ENROOT_RUNTIME_PATH="$caches/runtime" ENROOT_TEMP_PATH="$caches"
enroot import --output "$aside" {uri}
mv -f -- "$aside" "$final"
"""
