"""Checks whether a profile would work, as far as its cluster tells without a submission."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from nemotron.errors import ExitCode, NemotronError
from nemotron.executors import Execution, LeptonExecution, SlurmExecution
from nemotron.launch import lepton_jobs, slurm
from nemotron.launch.host import Host
from nemotron.preflight import Check
from nemotron.profile import Profile


def check_profile(profile: Profile) -> list[Check]:
    """Return the results of all checks, passed or failed."""
    found = [Check("ok", f"{profile.name} is a valid {profile.executor} profile")]
    try:
        found += _check(profile.execution)
    except NemotronError as error:
        found.append(Check("failed", error.problem, error))
    return found


def _check(execution: Execution) -> Iterator[Check]:
    if isinstance(execution, LeptonExecution):
        yield from lepton_jobs.check_workspace(execution)
        return
    yield from _check_secrets(execution)
    if isinstance(execution, SlurmExecution):
        yield from _check_slurm(execution)


def _check_secrets(execution: Execution) -> Iterator[Check]:
    for name in execution.secrets:
        if os.environ.get(name):
            yield Check("ok", f"secret {name} is set")
        else:
            yield _failed(f"secret {name} is not set here", f"export {name}=...")


def _check_slurm(execution: SlurmExecution) -> Iterator[Check]:
    host = slurm.host_of(execution)
    version = host.require(["sbatch", "--version"]).decode().strip()
    yield Check("ok", f"{version} on {host.name or 'this host'}")
    for key in ("partition", "run_partition", "batch_partition", "build_partition"):
        name = getattr(execution, key)
        if name is not None:
            yield _check_partition(host, key, name)
    yield _check_directory(host, slurm.job_root(execution))
    for mount in execution.mounts:
        source = mount.partition(":")[0]
        if host.run(["test", "-e", source]).returncode:
            yield _failed(f"mount source {source} does not exist", "correct mounts in the profile")
        else:
            yield Check("ok", f"mount source {source} exists")


def _check_partition(host: Host, key: str, name: str) -> Check:
    known = host.require(["sinfo", "--noheader", "--format=%R"]).decode().split()
    if all(part in known for part in name.split(",")):
        return Check("ok", f"{key} {name} exists")
    return _failed(
        f"{key} {name} is not one of: {', '.join(known)}", f"correct {key} in the profile"
    )


def _check_directory(host: Host, path: str) -> Check:
    """Check that jobs' files can be written, without writing any."""
    script = 'p=$1; while [ ! -e "$p" ]; do p=$(dirname -- "$p"); done; [ -d "$p" ] && [ -w "$p" ]'
    if host.run(["sh", "-c", script, "sh", path]).returncode:
        fix = f"create it (mkdir -p {shlex.quote(path)}), or set remote_job_dir"
        return _failed(f"remote_job_dir {path} is not writable", fix)
    return Check("ok", f"remote_job_dir {Path(path)} is writable")


def _failed(problem: str, fix: str) -> Check:
    error = NemotronError("profile_unusable", problem, fix=fix, exit_code=ExitCode.PREFLIGHT)
    return Check("failed", problem, error)
