"""What a run says: ``metrics.jsonl``, the truth, and a line now and then for people."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from nemotron.artifacts import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object per event to ``metrics.jsonl`` and prints some of them.

    Args:
        directory: Where ``metrics.jsonl`` goes; None on ranks that stay silent.
        train_iters: Iterations of the run, for the printed line.
        log_interval: Iterations between printed lines.
    """

    def __init__(self, directory: Path | None, *, train_iters: int, log_interval: int) -> None:
        self._path = directory / METRICS_FILE if directory else None
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._pending = ""
        self.iteration = 0

    def resume(self, iteration: int, directory: Path) -> None:
        """Drop what was recorded after ``iteration``, at which the save in ``directory`` was made.

        A line that a killed process left half written is dropped as well.
        """
        self.iteration = iteration
        if self._path is not None:
            lines = (
                self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
            )
            kept = [line for line in lines if _is_until(line, iteration)]
            write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._append({"event": "resumed", "iteration": iteration, "directory": str(directory)})

    def is_shown(self, iteration: int) -> bool:
        """Return whether an iteration gets a printed line; the same answer on all ranks."""
        return iteration % self._log_interval == 0 or iteration in (1, self._train_iters)

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        """Record one optimizer step; ``iteration`` counts from 1."""
        self.iteration = iteration
        self._append({"event": "step", "iteration": iteration, **values})
        if self.is_shown(iteration):
            self._print(
                f"iteration {iteration:>{len(str(self._train_iters))}}/{self._train_iters} | "
                f"lm loss {values['lm_loss']:.4f} | grad norm {values['grad_norm']:.3f} | "
                f"lr {values['learning_rate']:.2e} | "
                f"{values['tokens_per_second']:,.0f} tokens/s "
                f"({values['supervised_tokens_per_second']:,.0f} supervised)"
            )

    def validation(
        self, iteration: int, lm_loss: float, supervised_tokens: int, *, is_best: bool
    ) -> None:
        """Record the loss on the valid split after ``iteration`` optimizer steps."""
        event = {"event": "validation", "iteration": iteration, "lm_loss": lm_loss}
        self._append(event | {"supervised_tokens": supervised_tokens, "is_best": is_best})
        self._print(
            f"iteration {iteration:>{len(str(self._train_iters))}}/{self._train_iters} | "
            f"lm loss validation {lm_loss:.4f} | ppl {math.exp(min(lm_loss, 20.0)):.2f}"
        )

    def saved(self, iteration: int, directory: Path) -> None:
        """Record that the adapter of ``iteration`` is complete in ``directory``."""
        self._append({"event": "saved", "iteration": iteration, "directory": str(directory)})
        self._print(f"saved adapter: {directory}")

    def save_failed(self, iteration: int, problem: str) -> None:
        """Record that nothing was saved at ``iteration``; training goes on."""
        self._append({"event": "save_failed", "iteration": iteration, "problem": problem})
        self._print(f"nothing saved at iteration {iteration}: {problem}; earlier saves are whole")

    def _append(self, event: dict[str, Any]) -> None:
        """Write an event, after those that a full disk has kept back so far."""
        if self._path is None:
            return
        self._pending += json.dumps(event | {"time": round(time.time(), 3)}) + "\n"
        try:
            with self._path.open("ab", buffering=0) as stream:
                self._pending = self._pending[_write(stream, self._pending.encode()) :]
        except OSError as error:
            self._print(f"{self._path} cannot be written now: {error}")

    def _print(self, line: str) -> None:
        if self._path is not None:
            print(line, flush=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held so far, on its GPU or else in the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _write(stream: FileIO, text: bytes) -> int:
    """Return how many bytes were written: all of them, or less where the disk is full."""
    written = 0
    while written < len(text):
        try:
            written += stream.write(text[written:])
        except OSError:
            if not written:
                raise
            break
    return written


def _is_until(line: str, iteration: int) -> bool:
    try:
        return int(json.loads(line)["iteration"]) <= iteration
    except (ValueError, KeyError, TypeError):
        return False
