"""What a run prints, on a real terminal and elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.mirror_process import MirrorSettings

ERASE = "\r\x1b[K"
VALUES = {
    "lm_loss": 2.3412,
    "grad_norm": 0.5234,
    "learning_rate": 0.003,
    "tokens_per_second": 12345.4,
    "supervised_tokens_per_second": 3210.4,
    "tflops_per_rank": 0.01234,
}


def run(directory: Path, log_interval: int) -> None:
    """Let a run of three steps record what it does."""
    with MetricsLog(
        directory, train_iters=3, log_interval=log_interval, config={}, mirrors=MirrorSettings()
    ) as log:
        log.start()
        log.step(1, VALUES)
        log.step(2, VALUES)
        log.validation(2, 2.0, 10, is_best=True)
        log.step(3, VALUES)


def test_a_terminal_gets_one_line_that_is_rewritten_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        run(tmp_path, log_interval=100)
        monkeypatch.undo()
        # The kernel hands a terminal's output on when it likes: read up to a mark of our own.
        terminal.write("\0")
        terminal.flush()
        text = ""
        while not text.endswith("\0"):
            text += os.read(master, 65536).decode()
    os.close(master)
    text = text.removesuffix("\0").replace("\r\n", "\n")
    step = "iteration {}/3 | lm loss 2.3412 | 12,345 tokens/s | ETA 0:00:00"
    validation = "iteration 2/3 | lm loss validation 2.0000 | ppl 7.39\n"
    assert text == ERASE.join([step.format(1), step.format(2), validation]) + step.format(3) + "\n"


def test_a_log_gets_plain_lines_at_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, log_interval=2)
    first, second, _, third = capsys.readouterr().out.splitlines()
    assert first == (
        "iteration 1/3 | lm loss 2.3412 | grad norm 0.523 | lr 3.00e-03 | 12,345 tokens/s | "
        "3,210 supervised/s | 0.0123 TFLOP/s per rank | ETA 0:00:00"
    )
    assert (second, third) == tuple(first.replace("1/3", f"{n}/3") for n in (2, 3))
