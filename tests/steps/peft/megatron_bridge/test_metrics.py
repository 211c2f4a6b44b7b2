"""What a run leaves to be seen: metrics.jsonl, its mirrors, and what is printed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemotron.steps._training.device import describe, own_device

Train = Callable[..., Any]


def test_a_run_goes_on_in_its_records_and_mirrors_whatever_becomes_of_a_tracker(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "wandb.py").write_text("raise RuntimeError('it is down')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    plan = {
        "checkpoint.save": str(tmp_path / "out"),
        "scheduler.lr_decay_iters": 8,
        "logger.tensorboard_dir": str(tmp_path / "tensorboard"),
        "logger.wandb_project": "project",
    }
    assert train_here(**plan, **{"train.train_iters": 3}).exit_code == 0
    assert capfd.readouterr().err.count("wandb has stopped: RuntimeError: it is down") == 1
    run = train_here(**plan, **{"train.train_iters": 5})
    assert run.exit_code == 0
    started, resumed = (e for e in run.events if e["event"] in ("started", "resumed"))
    assert started["run"] == resumed["run"]
    assert [each["config"]["train"]["train_iters"] for each in (started, resumed)] == [3, 5]
    times = [event["time"] for event in run.events]
    assert times == sorted(times)
    mirrored = EventAccumulator(str(tmp_path / "tensorboard"))
    mirrored.Reload()
    steps = [(event.step, event.value) for event in mirrored.Scalars("lm loss")]
    assert steps == list(enumerate(np.array(run.losses, np.float32), start=1))
    validations = [event.value for event in mirrored.Scalars("lm loss validation")]
    assert validations == list(np.array(run.valid_losses, np.float32))


def test_a_run_says_where_it_computes_and_how_often_it_sees_its_rows(
    train_here: Train, tmp_path: Path, capfd: Any
) -> None:
    plan = {
        "checkpoint.save": str(tmp_path / "out"),
        "train.train_iters": 2,
        "train.eval_interval": 9,
        "scheduler.lr_warmup_iters": 9,  # of which there is room for two but a row
    }
    assert train_here(**plan).exit_code == 0
    said = capfd.readouterr().out
    assert f"1 rank on {describe(own_device())}: TP 1, PP 1, DP 1; float32\n2 steps of " in said
    assert "warm-up over 1.75 steps; " in said
    assert " rows validated every 2 steps\n" in said


def test_a_run_of_one_step_says_so_in_the_singular(
    train_here: Train, tmp_path: Path, capfd: Any
) -> None:
    plan = {"checkpoint.save": str(tmp_path / "out"), "train.train_iters": 1}
    assert train_here(**plan).exit_code == 0
    said = capfd.readouterr().out
    assert "\n1 step of " in said
    assert " validated every 1 step\n" in said
