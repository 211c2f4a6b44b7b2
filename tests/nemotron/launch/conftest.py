"""Clusters to launch on: a real Slurm of two nodes, made once per session by rig/slurm_rig.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli.app import main

RIG = Path(__file__).parent / "rig"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
# No container, no GPU, a partition; the interpreter that runs the tests.
PROFILE = f"""
[rig]
executor = "slurm"
container_image = ""
gpus_per_node = 0
partition = "main"
time = "00:30:00"
startup_commands = ["export PATH={Path(sys.executable).parent}:$PATH"]
"""


@dataclass(frozen=True)
class Result:
    """A finished command line."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """What it printed as JSON."""
        return json.loads(self.out)


@pytest.fixture
def nemotron(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Return the command line as a function."""

    def run(*words: str) -> Result:
        capfd.readouterr()
        code = main(list(words))
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


LAUNCHER = """
import os, pathlib, sys
from nemotron import catalog
from nemotron.cli.app import main
catalog.steps_root = lambda: pathlib.Path(os.environ["DEMO_STEPS"])
sys.exit(main())
"""


@pytest.fixture
def launcher(demo: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts the command line, on the demo steps, in a process."""

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """Return a function that returns what a condition returns, once it is true."""

    def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.1)
        return found

    return until


@contextmanager
def running(command: list[str]) -> Iterator[str]:
    """Run a rig, which ends when its standard input does; give the first line that it prints."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
        process.stdin.close()
        process.wait(60)


@pytest.fixture(scope="session")
def slurm_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start the cluster; skip where it cannot be."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own needs root for namespaces and daemons")
    if missing:
        pytest.skip(f"a Slurm of our own needs {', '.join(missing)} (see .ci/run)")
    root = tmp_path_factory.mktemp("slurm")
    command = [sys.executable, str(RIG / "slurm_rig.py"), str(root)]
    with running(command) as first_line:
        assert first_line == "up", "the cluster did not come up"
        yield root


@pytest.fixture
def cluster(slurm_rig: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory whose profile ``rig`` is the cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_rig / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{slurm_rig / 'bin'}:{os.environ['PATH']}")
    (here / "env.toml").write_text(PROFILE)
    return here


@pytest.fixture
def slurm(cluster: Path, demo: Path) -> Path:
    """Return the same directory, with the demo steps."""
    return cluster
