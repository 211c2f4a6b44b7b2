"""Starts the processes that mirror a run's metrics, and ends them with the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MirrorSettings:
    """Where the metrics go beside ``metrics.jsonl``; nowhere by default.

    Attributes:
        tensorboard_dir: Directory of TensorBoard's event files; None: no TensorBoard.
        tensorboard_log_interval: Steps between those that mirrors get.
        wandb_project: Project on Weights & Biases; None: no Weights & Biases.
        wandb_exp_name: Name of the run there.
        wandb_entity: Who the project belongs to; None: the default of the account.
        wandb_save_dir: Where wandb keeps its files; None: as wandb decides.
    """

    tensorboard_dir: str | None = None
    tensorboard_log_interval: int = 1
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_entity: str | None = None
    wandb_save_dir: str | None = None

    def arguments(self) -> Iterator[list[str]]:
        """Yield what each mirror wants on its command line."""
        if self.tensorboard_dir is not None:
            yield ["tensorboard", self.tensorboard_dir]
        if self.wandb_project is not None:
            options = {
                "--name": self.wandb_exp_name,
                "--entity": self.wandb_entity,
                "--directory": self.wandb_save_dir,
            }
            given = [f"{option}={value}" for option, value in options.items() if value is not None]
            yield ["wandb", *given, "--", self.wandb_project]


class MirrorProcesses:
    """Starts a ``mirror`` for each place that the settings name; says why one is lost, once."""

    def __init__(self, settings: MirrorSettings) -> None:
        self._settings = settings
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, metrics: Path, offset: int) -> None:
        """Start the mirrors, which copy a file as it grows, from the byte ``offset`` on."""
        every = self._settings.tensorboard_log_interval
        command = [sys.executable, "-m", "nemotron.steps._training.mirror"]
        command += [f"--metrics={metrics}", f"--offset={offset}", f"--every={every}"]
        for arguments in self._settings.arguments():
            try:
                self._running[arguments[0]] = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # what stops the run by its group lets the mirror finish
                )
            except OSError as error:
                _warn(f"{arguments[0]} could not be started: {error}")

    def close(self, seconds: float) -> None:
        """Tell the mirrors that the run is over; kill those that are not done in this time."""
        deadline = time.monotonic() + seconds
        for process in self._running.values():
            assert process.stdin is not None  # opened as a pipe
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for kind, process in self._running.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _warn(f"{kind} did not finish within {seconds:.0f} s: its last values are lost")
                continue
            if process.returncode < 0:
                _warn(f"{kind} was killed by signal {-process.returncode}")
        self._running.clear()


def _warn(problem: str) -> None:
    print(f"warning: {problem}; metrics.jsonl has everything", file=sys.stderr, flush=True)
