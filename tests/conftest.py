"""What the tests share: real ranks under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunRanks = Callable[..., dict[str, Any]]


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
