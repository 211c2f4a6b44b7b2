"""What the tests share: real ranks under torchrun, and disks that are soon full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RunRanks = Callable[..., dict[str, Any]]
SmallDisk = Callable[[int], Path]


def pytest_configure() -> None:
    """Take signals as behind a terminal, also under nohup or in the background of a shell."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """Return a function that runs a worker script on N gloo ranks and returns its JSON report.

    The worker gets the path of the report as its last argument; rank 0 writes it.
    """

    def run(worker: Path, num_ranks: int, *arguments: str) -> dict[str, Any]:
        report = tmp_path_factory.mktemp("ranks") / "report.json"
        command = [sys.executable, "-W", "error::FutureWarning", "-m", "torch.distributed.run"]
        command += ["--standalone", f"--nproc-per-node={num_ranks}", str(worker)]
        done = subprocess.run(
            [*command, *arguments, str(report)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::FutureWarning"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(report.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Return a function that makes a directory with room for so many bytes; a page at least."""
    made: list[Path] = []

    def make(num_bytes: int) -> Path:
        path = tmp_path / f"disk_{len(made)}"
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a disk of our own needs root that may mount one")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["umount", str(path)], check=True)
