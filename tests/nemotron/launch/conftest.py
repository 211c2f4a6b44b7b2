"""Clusters to launch on: a real Slurm of two nodes, made once per session by rig/slurm_rig.py."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nemotron as nemotron_package
from nemotron.catalog import find_step
from nemotron.cli.app import main
from nemotron.launch import lepton_jobs, remote, slurm_jobs
from nemotron.plan import JobPlan, build
from nemotron.profile import load_profile

RIG = Path(__file__).parent / "rig"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
# No container, no GPU, a partition; the interpreter that runs the tests.
PYTHON = f"export PATH={Path(sys.executable).parent}:$PATH"
PROFILE = f"""
[rig]
executor = "slurm"
container_image = ""
gpus_per_node = 0
partition = "main"
time = "00:30:00"
startup_commands = ["{PYTHON}"]
"""


@pytest.fixture(autouse=True)
def _ask_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask schedulers on this machine as often as they can bear it."""
    monkeypatch.setattr(slurm_jobs, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(slurm_jobs, "POLL_SECONDS_OVER_SSH", 0.2)
    monkeypatch.setattr(slurm_jobs, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(lepton_jobs, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(remote, "_SETTLE_SECONDS", 0.05)


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
import nemotron as nemotron_package
from nemotron.cli.app import main
catalog.steps_root = lambda: pathlib.Path(os.environ["DEMO_STEPS"])
sys.exit(main())
"""


@pytest.fixture
def launcher(demo: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts the command line, on the demo steps, in a process."""

    def start(*words: str, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *words],
            stdin=subprocess.DEVNULL,
            text=True,
            **{**pipes, **options},
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


@contextmanager
def open_cluster(root: Path, *options: str) -> Iterator[Path]:
    """Run a cluster whose files are in ``root``; give that."""
    command = [sys.executable, str(RIG / "slurm_rig.py"), str(root), *options]
    with running(command) as first_line:
        assert first_line == "up", "the cluster did not come up"
        yield root


@pytest.fixture(scope="session")
def slurm_rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start the cluster; skip where it cannot be."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("a Slurm of our own needs root for namespaces and daemons")
    if missing:
        pytest.skip(f"a Slurm of our own needs {', '.join(missing)} (see .ci/run)")
    if subprocess.run(["unshare", "--net", "--mount", "true"], check=False).returncode:
        pytest.skip("a Slurm of our own needs namespaces, which root may not make here")
    with open_cluster(tmp_path_factory.mktemp("slurm")) as root:
        yield root


@dataclass(frozen=True)
class LoginNode:
    """An sshd on loopback that takes one key, and an ``ssh`` that knows only its own hosts."""

    port: int
    identity: Path
    known_hosts: Path
    tools: Path

    def profile(self, root: Path) -> str:
        """Return the keys of a profile that reaches the cluster through it, with ``root`` there."""
        return (
            f'tunnel = "ssh"\nhost = "127.0.0.1"\nuser = "root"\nport = {self.port}\n'
            f'identity = "{self.identity}"\nremote_job_dir = "{root}"\n'
        )

    def environment(self) -> dict[str, str]:
        """Return the variables with which ``ssh`` finds it."""
        path = f"{self.tools}:{os.environ['PATH']}"
        return {"PATH": path, "RIG_KNOWN_HOSTS": str(self.known_hosts)}


@contextmanager
def open_login_node(root: Path, cluster: Path, sshd: str) -> Iterator[LoginNode]:
    """Run a login node of a cluster, with its files in ``root``."""
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
        subprocess.run(command, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"HostKey {root}/host", f"AuthorizedKeysFile {root}/user.pub", f"Port {port}"]
    options += ["ListenAddress 127.0.0.1", f"PidFile {root}/pid", "StrictModes no", "UsePAM no"]
    path = f"{cluster}/bin:/usr/local/bin:/usr/bin:/bin"
    options += ["PasswordAuthentication no", f"SetEnv SLURM_CONF={cluster}/slurm.conf PATH={path}"]
    (root / "config").write_text("\n".join([*options, "Subsystem sftp internal-sftp\n"]))
    Path("/run/sshd").mkdir(exist_ok=True)
    (root / "known_hosts").write_text(f"[127.0.0.1]:{port} {(root / 'host.pub').read_text()}")
    tools = root / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(
        '#!/bin/sh\nexec /usr/bin/ssh -F none -o UserKnownHostsFile="$RIG_KNOWN_HOSTS" "$@"\n'
    )
    (tools / "ssh").chmod(0o755)
    with subprocess.Popen(
        [sshd, "-D", "-f", str(root / "config"), "-E", str(root / "log")]
    ) as server:
        _wait_until_it_listens(port, server)
        yield LoginNode(port, root / "user", root / "known_hosts", tools)
        server.terminate()


def _wait_until_it_listens(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert server.poll() is None, "sshd has ended"
            assert time.monotonic() < end, "sshd does not listen"
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def login_node(slurm_rig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoginNode]:
    """Start a login node of the cluster."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("a login node of our own needs sshd and ssh (see .ci/run)")
    with open_login_node(tmp_path_factory.mktemp("sshd"), slurm_rig, sshd) as node:
        yield node


@pytest.fixture
def over_ssh(
    login_node: LoginNode, slurm: Path, demo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a directory outside of the cluster; profile ``far`` reaches it over ssh."""
    monkeypatch.delenv("SLURM_CONF")
    for name, value in login_node.environment().items():
        monkeypatch.setenv(name, value)
    with (slurm / "env.toml").open("a") as file:
        file.write(
            f'[far]\nextends = "rig"\n{login_node.profile(slurm / "far")}'
            f'env_vars = {{ PYTHONPATH = "{os.environ["PYTHONPATH"]}", '
            f'DEMO_STEPS = "{demo_root}" }}\n'
        )
    return slurm


@pytest.fixture
def cluster(slurm_rig: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory whose profile ``rig`` is the cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm_rig / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{slurm_rig / 'bin'}:{os.environ['PATH']}")
    # Runs on this machine and on the cluster are of the code under test.
    monkeypatch.setenv("PYTHONPATH", str(Path(nemotron_package.__file__).parents[1]))
    (here / "env.toml").write_text(PROFILE)
    return here


@pytest.fixture
def slurm(cluster: Path, demo: Path) -> Path:
    """Return the same directory, with the demo steps."""
    return cluster


def plan_of(executor: str, demo: Path) -> JobPlan:
    """Return a plan of a demo step on that executor, in an image."""
    (demo / "env.toml").write_text(
        f'[p]\nexecutor = "{executor}"\ncontainer_image = "x"\nstartup_commands = ["true"]\n'
    )
    return build(find_step("demo/make"), profile=load_profile("p"))
