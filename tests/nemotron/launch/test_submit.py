"""What Slurm's commands are given: stand-ins for them write it down; no cluster is needed."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.catalog import find_step
from nemotron.launch import Console
from nemotron.launch.host import Host
from nemotron.launch.lazy import load_nemo
from nemotron.launch.squash import import_image
from nemotron.plan import build
from nemotron.profile import load_profile

Nemotron = Callable[..., Any]
PROFILE = '[cluster]\nexecutor = "slurm"\ncontainer_image = ""\n'


@pytest.fixture
def stand_in(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with ``NAME.arguments`` and ``NAME.environment`` of each command run."""
    said = tmp_path / "said"
    tools = tmp_path / "tools"
    for directory in (said, tools):
        directory.mkdir()
    # A login node is this machine, reached as ssh reaches it: by one line for a shell.
    ssh = f'printf "%s\\n" "$@" >> {said}/logins; for line; do :; done; exec sh -c "$line"'
    for name, answer in {"sbatch": "echo 7", "srun": "true", "ssh": ssh}.items():
        (tools / name).write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}/{name}.arguments\n'
            f"env > {said}/{name}.environment\n{answer}\n"
        )
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (demo / "env.toml").write_text(PROFILE)
    return said


@pytest.mark.parametrize("command", ["sbatch", "srun"])
def test_a_job_around_the_launcher_changes_nothing_of_what_is_submitted(
    stand_in: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    others = ("SBATCH_TIMELIMIT", "SLURM_CPU_BIND", "SLURM_JOB_ID", "SLURM_PROCID", "SRUN_MPI")
    for name in others:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_CLUSTERS", "big")
    # An image, so that srun imports it.
    words = ["container_image=registry/image", "remote_job_dir=" + str(stand_in)]
    done = nemotron("steps", "run", "demo/make", "-b", "cluster", *(f"run.env.{w}" for w in words))
    assert done.code == 0, done.err
    said = (stand_in / f"{command}.environment").read_text()
    assert not [name for name in others if f"\n{name}=" in f"\n{said}"]
    assert "SLURM_CONF=/etc/slurm.conf\n" in said
    assert "SLURM_CLUSTERS=big\n" in said


def test_an_import_asks_for_what_the_profile_says_and_for_an_hour(
    stand_in: Path, nemotron: Nemotron
) -> None:
    wanted = {"account": "a", "qos": "q", "reservation": "r", "constraint": "c", "partition": "p"}
    words = ["container_image=registry/image", "time=3-00:00:00", f"remote_job_dir={stand_in}"]
    words += [f"{key}={value}" for key, value in wanted.items()]
    done = nemotron("steps", "run", "demo/make", "-b", "cluster", *(f"run.env.{w}" for w in words))
    assert done.code == 0, done.err
    said = (stand_in / "srun.arguments").read_text().splitlines()
    assert {f"--{key}={value}" for key, value in wanted.items()} <= set(said)
    assert "--time=01:00:00" in said


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("time=00:30:00", "00:30:00"),
        ("time=30", "30"),
        ("time=59:59", "59:59"),
        ("time=0-00:30", "0-00:30"),
        ("time=60", "01:00:00"),
        ("time=60:01", "01:00:00"),
        ("time=02:00:00", "01:00:00"),
        ("time=1-0", "01:00:00"),
        ("time=0", "01:00:00"),  # no limit
        ("time=30 build_partition=builders", "01:00:00"),
        ("time=30 build_time=00:45:00", "00:45:00"),
    ],
)
def test_an_import_asks_for_no_more_time_than_the_job_in_the_same_partition(
    stand_in: Path, written: str, wanted: str
) -> None:
    words = ["container_image=registry/image", f"remote_job_dir={stand_in}", *written.split()]
    quoted = [f"run.env.{key}={value!r}" for key, _, value in (w.partition("=") for w in words)]
    plan = build(find_step("demo/make"), profile=load_profile("cluster"), overrides=quoted)
    nowhere = Console([], lambda _: None, io.BytesIO(), io.BytesIO())
    import_image(plan, Host(), nowhere)
    assert f"--time={wanted}\n" in (stand_in / "srun.arguments").read_text()


@pytest.mark.parametrize("cores", [None, "6"])
def test_the_one_task_of_a_node_gets_all_its_cores(
    stand_in: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch, cores: str | None
) -> None:
    # As the batch shell on the first node would.
    given = f"SLURM_CPUS_PER_TASK={cores}" if cores else ""
    sbatch = stand_in.parent / "tools" / "sbatch"
    run = f'#!/bin/sh\n{given} SLURM_JOB_ID=7 bash "$3" >/dev/null 2>&1\necho 7\n'
    sbatch.write_text(run)  # after --requeue and --parsable
    done = nemotron("steps", "run", "demo/make", "-b", "cluster")
    assert done.code == 0, done.err
    said = (stand_in / "srun.environment").read_text().splitlines()
    assert "SLURM_CPU_BIND=none" in said
    assert [line for line in said if line.startswith("SRUN_CPUS_PER_TASK=")] == (
        [f"SRUN_CPUS_PER_TASK={cores}"] if cores else []
    )


def test_ssh_alone_says_who_logs_in_and_how(
    stand_in: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "somebody")  # not who ~/.ssh/config says
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    far = stand_in / "far"
    words = ("tunnel=ssh", "host=gate", f"remote_job_dir={far}", "secrets=[HF_TOKEN]")
    done = nemotron("steps", "run", "demo/make", "-b", "cluster", *(f"run.env.{w}" for w in words))
    assert done.code == 0, done.err
    script = Path((stand_in / "sbatch.arguments").read_text().splitlines()[-1])
    assert script.is_relative_to(far)
    assert "#SBATCH --nodes=1" in script.read_text()
    assert (script.parent / "demo-make" / "code" / "launch.sh").is_file()
    assert "HF_TOKEN=hunter2hunter2\n" in (stand_in / "sbatch.environment").read_text()
    logins = (stand_in / "logins").read_text().splitlines()
    assert "-l" not in logins
    assert "somebody" not in logins
    assert not [path for path in far.rglob("*") if path.stat().st_mode & 0o077]


def test_what_sbatch_says_over_ssh_is_told(stand_in: Path, nemotron: Nemotron) -> None:
    sbatch = stand_in.parent / "tools" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: no such account' >&2\nexit 1\n")
    words = ("tunnel=ssh", "host=gate", f"remote_job_dir={stand_in}/far")
    done = nemotron("steps", "run", "demo/make", "-b", "cluster", *(f"run.env.{w}" for w in words))
    assert done.code == 9
    assert (
        "error[submission_failed]: the job could not be submitted: sbatch: error: no such"
        in done.err
    )


def test_files_that_take_too_long_to_copy_are_named_as_the_reason(
    stand_in: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = stand_in.parent / "tools" / "ssh"
    answer = ssh.read_text()
    # The login node answers, and takes no files.
    ssh.write_text(
        answer.replace("for line", 'case "$*" in *"tar -x"*) exec sleep 60; esac\nfor line', 1)
    )
    monkeypatch.setattr(load_nemo(), "_SBATCH_SECONDS", 1)
    words = ("tunnel=ssh", "host=far", f"remote_job_dir={stand_in}/far")
    done = nemotron("steps", "run", "demo/make", "-b", "cluster", *(f"run.env.{w}" for w in words))
    assert done.code == 9, done.err
    assert re.search(
        r"the job could not be submitted: copying \d+\.\d MiB to far took longer than 1 s", done.err
    )
