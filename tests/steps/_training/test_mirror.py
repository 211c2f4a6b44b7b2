"""Mirrors of metrics.jsonl: real trackers get what it gets, and none can hurt the run."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron.steps._training.mirror_process import MirrorProcesses, MirrorSettings

BEGIN = {"event": "started", "iteration": 0, "time": 1.0, "run": "ab12", "config": {}}


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("an earlier life\n")
    append(path, BEGIN)
    return path


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a package in the place of a tracker's."""

    def put(package: str, code: str) -> None:
        (tmp_path / "stubs").mkdir()
        (tmp_path / "stubs" / f"{package}.py").write_text(code)
        paths = [str(tmp_path / "stubs"), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    return put


def append(path: Path, *events: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write("".join(json.dumps(event) + "\n" for event in events))


def step(iteration: int) -> dict[str, Any]:
    return {"event": "step", "iteration": iteration, "time": 1.0 + iteration, "lm_loss": 1.5}


def start(metrics: Path, **settings: Any) -> MirrorProcesses:
    mirrors = MirrorProcesses(MirrorSettings(**settings))
    mirrors.start(metrics, len("an earlier life\n"))
    return mirrors


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard itself reads from its event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard_and_wandb_get_what_the_file_gets(
    metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    mirrors = start(
        metrics,
        tensorboard_dir=str(tmp_path / "tb"),
        tensorboard_log_interval=2,
        wandb_project="project",
        wandb_exp_name="-named like an option",
        wandb_save_dir=str(tmp_path),
    )
    append(metrics, *(step(iteration) for iteration in range(1, 6)))
    append(metrics, {"event": "validation", "iteration": 5, "time": 7.0, "lm_loss": 0.25})
    mirrors.close(60.0)
    assert scalars(tmp_path / "tb") == {
        "lm loss": [(1, 1.5), (2, 1.5), (4, 1.5)],
        "lm loss validation": [(5, 0.25)],
        "lm loss validation ppl": [(5, np.float32(math.exp(0.25)))],
    }
    (run,) = tmp_path.glob("wandb/offline-run-*-ab12/run-ab12.wandb")
    content = run.read_bytes()
    assert str(math.exp(0.25)).encode() in content
    assert b"-named like an option" in content
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"0123456789" * 4 in path.read_bytes() for path in written)
    assert capfd.readouterr().err == ""


def test_what_a_killed_life_of_the_run_added_is_not_shown_once_it_has_gone_on(
    metrics: Path, tmp_path: Path
) -> None:
    tensorboard = {"tensorboard_dir": str(tmp_path / "tb")}
    mirrors = start(metrics, **tensorboard)
    append(metrics, *(step(iteration) for iteration in range(1, 6)))
    mirrors.close(60.0)
    metrics.write_text("an earlier life\n")
    append(metrics, BEGIN | {"event": "resumed", "iteration": 3, "time": 9.0}, step(4))
    start(metrics, **tensorboard).close(60.0)
    assert [iteration for iteration, _ in scalars(tmp_path / "tb")["lm loss"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no wandb here')", "wandb has stopped: ImportError: no wandb here;"),
        (
            "class Settings:\n    def __init__(self, **_): pass\n"
            "def init(**_): raise ConnectionError('the server is gone')",
            "wandb has stopped: ConnectionError: the server is gone;",
        ),
        ("import os\nos.kill(os.getpid(), 9)", "wandb was killed by signal 9;"),
    ],
    ids=["not installed", "raises", "crashes"],
)
def test_a_tracker_that_fails_is_said_once(
    metrics: Path, stub: Callable[[str, str], None], capfd: Any, code: str, reason: str
) -> None:
    stub("wandb", code)
    mirrors = start(metrics, wandb_project="p")
    append(metrics, *(step(iteration) for iteration in range(1, 6)))
    mirrors.close(60.0)
    err = capfd.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def test_a_directory_that_cannot_be_written_is_said_once(metrics: Path, capfd: Any) -> None:
    start(metrics, tensorboard_dir=str(metrics / "tb")).close(60.0)
    err = capfd.readouterr().err
    assert err.startswith("warning: logging to tensorboard has stopped: ")
    assert err.count("\n") == 1


def test_a_disk_that_fills_up_under_tensorboard_is_said_once(
    metrics: Path, tmp_path: Path, capfd: Any
) -> None:
    append(metrics, *(step(iteration) for iteration in range(1, 5000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        mirrors = start(metrics, tensorboard_dir=str(tmp_path / "tb"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    mirrors.close(60.0)
    err = capfd.readouterr().err
    assert "tensorboard has stopped: OSError: [Errno 27] File too large" in err
    assert err.count("\n") == 1


def test_a_tracker_that_hangs_is_not_waited_for(
    metrics: Path, stub: Callable[[str, str], None], capfd: Any
) -> None:
    stub("wandb", "import time\ntime.sleep(600)")
    mirrors = start(metrics, wandb_project="p")
    mirrors.close(0.2)
    err = capfd.readouterr().err
    assert "wandb did not finish within 0 s: its last values are lost;" in err
