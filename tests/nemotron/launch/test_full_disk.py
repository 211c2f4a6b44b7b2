"""A disk that is full under a job's record and log costs these, not the job."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Launcher = Callable[..., subprocess.Popen[str]]
LOUD = "echo up; until [ -e release ]; do sleep 0.1; done; head -c 300000 /dev/zero; echo; echo end"
# A write past the limit fails as one does on a full disk, and for this process alone.
FULL = 10


@pytest.mark.parametrize(("words", "code"), [([], 0), (["behaviour=refuse"], 4)])
def test_a_disk_that_fills_up_costs_the_log_and_not_the_job(
    demo: Path, launcher: Launcher, words: list[str], code: int
) -> None:
    loud = f"run.env.startup_commands=['{LOUD}']"
    run = launcher("steps", "run", "demo/make", loud, *words, "--json", stderr=subprocess.STDOUT)
    assert run.stdout is not None
    while run.stdout.readline() != "up\n":
        pass
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
    Path("release").touch()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == code, out[-2000:]
    assert out.count("note: the job's log.txt cannot be written: File too large") == 1
    assert out.count("note: the job's record cannot be written: File too large") == 1
    assert "end\nmaking\n" in out  # what the log misses is still shown
    shown: dict[str, Any] = json.loads(out[out.rindex("\n{") :])
    assert shown["exit_code"] == code
    (path,) = Path(".nemotron", "jobs").glob("*/job.json")
    assert json.loads(path.read_text())["status"] == "running"  # complete, and as it was before
