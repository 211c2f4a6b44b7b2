"""Records of training runs, as the trainer and the launcher write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nemotron import jobs
from nemotron.jobs import Job

START = 1_700_000_000.0


@pytest.fixture
def write_metrics(here: Path) -> Callable[..., Path]:
    """Return a function that writes the metrics.jsonl of a run of some steps."""

    def write(name: str, *, num_steps: int = 4, rest: str = "", **config: Any) -> Path:
        directory = here / name
        directory.mkdir()
        begin = {"event": "started", "iteration": 0, "time": START, "run": "ab12"}
        values = {"train": {"train_iters": 8}, "checkpoint": {"save": name}, **config}
        events = [begin | {"config": values}, validation(0, 3.0)]
        events += [step(iteration) for iteration in range(1, num_steps + 1)]
        events += [validation(num_steps, 2.5), saved(num_steps)]
        lines = [json.dumps(event) + "\n" for event in events]
        (directory / "metrics.jsonl").write_text("".join(lines) + rest)
        return directory

    return write


@pytest.fixture
def job(here: Path) -> Callable[..., Job]:
    """Return a function that leaves the record of a job that wrote to a directory."""

    def leave(
        save: str,
        *,
        ended: float = 0.0,
        code: int = 0,
        error: dict[str, Any] | None = None,
        lost_since: float | None = None,
    ) -> Job:
        """Leave one that ended, or one whose launcher was killed; seconds after ``START``."""
        made = jobs.create(
            jobs.new_directory("peft/megatron_bridge"),
            step="peft/megatron_bridge",
            profile=None,
            argv=["nemotron"],
            command=["python"],
            values={"checkpoint": {"save": save}},
            config_text="",
        )
        if lost_since is not None:
            made.update(status="running", queued=_iso(lost_since), started=_iso(lost_since), pid=-1)
            return made
        made.end(code, error)
        made.update(ended=_iso(ended))
        return made

    return leave


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds).astimezone().isoformat()


def step(iteration: int) -> dict[str, Any]:
    return {
        "event": "step",
        "iteration": iteration,
        "time": START + iteration,
        "lm_loss": 3.0 / iteration,
        "grad_norm": 1.0,
        "learning_rate": 0.001 * iteration,
        "tokens": 100,
        "supervised_tokens": 25,
        "seconds": 0.5,
        "tokens_per_second": 200.0,
        "supervised_tokens_per_second": 50.0,
        "tflops_per_rank": 0.25,
    } | ({"peak_memory_bytes": iteration * 2**30} if iteration % 2 else {})


def validation(iteration: int, lm_loss: float) -> dict[str, Any]:
    at = {"event": "validation", "iteration": iteration, "time": START + iteration}
    return at | {"lm_loss": lm_loss, "supervised_tokens": 10, "is_best": True}


def saved(iteration: int) -> dict[str, Any]:
    directory = f"iter_{iteration:07d}"
    return {
        "event": "saved",
        "iteration": iteration,
        "time": START + iteration,
        "directory": directory,
    }
