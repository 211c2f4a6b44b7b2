"""Whoever reads of a job may leave: the job goes on, and its exit code is what is told."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Launcher = Callable[..., subprocess.Popen[Any]]
WAIT = "echo waiting; until [ -e release ]; do sleep 0.1; done"
MADE = Path("out") / "make" / "made.txt"


def record() -> dict[str, Any]:
    (path,) = Path(".nemotron", "jobs").glob("*/job.json")
    return json.loads(path.read_text())


@pytest.fixture
def unread() -> int:
    """Return a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("words", [[], ["--json"], ["-b", "local"]])
@pytest.mark.parametrize(("behaviour", "code"), [("ok", 0), ("refuse", 4)])
def test_a_run_outlasts_a_pipe_that_nobody_reads(
    demo: Path, launcher: Launcher, unread: int, words: list[str], behaviour: str, code: int
) -> None:
    run = ("steps", "run", "demo/make", f"behaviour={behaviour}", "--force-squash", *words)
    started = launcher(*run, stdout=unread, stderr=unread)
    assert started.wait(60) == (0 if "-b" in words else code)
    followed = launcher("jobs", "logs", "-f", record()["id"], stdout=unread, stderr=unread)
    assert followed.wait(60) == code
    waited = launcher("jobs", "wait", record()["id"], "--json", stdout=unread, stderr=unread)
    assert waited.wait(60) == code
    assert record()["exit_code"] == code
    assert MADE.is_file() == (code == 0)


def test_a_file_on_a_full_disk_costs_what_it_would_have_shown(
    demo: Path, launcher: Launcher
) -> None:
    with Path("/dev/full").open("wb") as full:
        run = launcher("steps", "run", "demo/make", stdout=full, stderr=full)
    assert run.wait(60) == 0
    assert record()["status"] == "succeeded"


def test_a_run_outlasts_its_terminal(demo: Path, launcher: Launcher) -> None:
    master, slave = os.openpty()
    words = ("steps", "run", "demo/make", f"run.env.startup_commands=['{WAIT}']")
    run = launcher(*words, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while b"waiting" not in shown:
        shown += os.read(master, 1000)
    os.close(master)  # whatever is written from now on is EIO
    Path("release").touch()
    assert run.wait(60) == 0
    assert record()["status"] == "succeeded"


def test_an_error_that_nobody_reads_keeps_its_exit_code(
    demo: Path, launcher: Launcher, unread: int
) -> None:
    words = ("steps", "run", "demo/make", "behavior=ok")
    assert launcher(*words, stdout=unread, stderr=unread).wait(60) == 2
    assert launcher(*words, "--json", stdout=unread, stderr=unread).wait(60) == 2
