"""The record of a run: every event goes to ``metrics.jsonl``, and some are printed."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from nemotron.artifacts import write_text
from nemotron.steps._entry import PreemptedError
from nemotron.steps._host import peak_host_memory_bytes
from nemotron.steps._training.mirror_process import MirrorProcesses, MirrorSettings
from nemotron.steps._training.printer import Clock, Printer
from nemotron.steps._training.run_directory import METRICS_FILE

# How long a run waits for its mirrors at the end: for an upload, or briefly if the run has failed.
_PATIENCE_SECONDS, _PATIENCE_OF_FAILED_SECONDS = 30.0, 2.0


class MetricsLog:
    """Appends one JSON object per event to ``metrics.jsonl`` and prints some of them.

    Every event has its ``event``, ``iteration`` (optimizer steps taken) and Unix ``time``.

    Args:
        directory: Where ``metrics.jsonl`` goes; None on ranks that record nothing.
        train_iters: Iterations of the run, for the printed line.
        log_interval: Iterations between printed lines.
        config: The run's config, recorded when the run starts.
        mirrors: Trackers that also get the events. Use the log as a context, so that they end
            with it.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        train_iters: int,
        log_interval: int,
        config: dict[str, Any],
        mirrors: MirrorSettings,
    ) -> None:
        self._path = directory / METRICS_FILE if directory else None
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._config = config
        self._mirrors = MirrorProcesses(mirrors)
        self._printer = Printer(sys.stdout)
        self._clock = Clock(0, train_iters)
        self._pending = ""
        self.iteration = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        has_ended_well = error is None or isinstance(error, PreemptedError)
        self._printer.close()
        self._mirrors.close(_PATIENCE_SECONDS if has_ended_well else _PATIENCE_OF_FAILED_SECONDS)

    def start(self) -> None:
        """Record that a run starts at iteration 0."""
        self._clock = Clock(0, self._train_iters)
        self._begin({"event": "started", "iteration": 0}, run=secrets.token_hex(4))

    def resume(self, iteration: int, directory: Path) -> None:
        """Record that a run resumes from the save of ``iteration`` in ``directory``.

        Events after that iteration are dropped, and so is a line that a killed process has left
        incomplete.
        """
        self.iteration = iteration
        self._clock = Clock(iteration, self._train_iters)
        kept: list[str] = []
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_until(line, iteration)]
            write_text(self._path, "".join(f"{line}\n" for line in kept))
        runs = (json.loads(line).get("run") for line in kept)
        run = next((each for each in runs if each), None) or secrets.token_hex(4)
        event = {"event": "resumed", "iteration": iteration, "directory": str(directory)}
        self._begin(event, run=run)

    def _begin(self, event: dict[str, Any], *, run: str) -> None:
        """Record a start of the run, with the id that trackers know it by; start the mirrors."""
        if self._path is None:
            return
        offset = self._path.stat().st_size if self._path.exists() else 0
        self._append(event | {"run": run, "config": self._config})
        if self._path.exists():
            self._mirrors.start(self._path, offset)

    def is_shown(self, iteration: int) -> bool:
        """Return whether an iteration gets a printed line; the same answer on all ranks."""
        return iteration % self._log_interval == 0 or iteration in (1, self._train_iters)

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        """Record one optimizer step; ``iteration`` counts from 1."""
        self.iteration = iteration
        self._append({"event": "step", "iteration": iteration, **values})
        if self._path is None:
            return
        speed = f"{values['tokens_per_second']:,.0f} tokens/s"
        eta = f"ETA {self._clock.eta(iteration)}"
        loss = f"lm loss {values['lm_loss']:.4f}"
        if self._printer.is_terminal:
            self._printer.progress(" | ".join([self._at(iteration), loss, speed, eta]))
        elif self.is_shown(iteration):
            norm, lr = f"grad norm {values['grad_norm']:.3f}", f"lr {values['learning_rate']:.2e}"
            supervised = f"{values['supervised_tokens_per_second']:,.0f} supervised/s"
            tflops = f"{values['tflops_per_rank']:.3g} TFLOP/s per rank"
            parts = [self._at(iteration), loss, norm, lr, speed, supervised, tflops, eta]
            self._printer.line(" | ".join(parts))

    def validation(
        self, iteration: int, lm_loss: float, supervised_tokens: int, *, is_best: bool
    ) -> None:
        """Record the loss on the valid split after ``iteration`` optimizer steps."""
        event = {"event": "validation", "iteration": iteration, "lm_loss": lm_loss}
        self._append(event | {"supervised_tokens": supervised_tokens, "is_best": is_best})
        ppl = f"ppl {math.exp(min(lm_loss, 20.0)):.2f}"
        self._print(" | ".join([self._at(iteration), f"lm loss validation {lm_loss:.4f}", ppl]))

    def saved(self, iteration: int, directory: Path) -> None:
        """Record that the adapter of ``iteration`` is complete in ``directory``."""
        self._append({"event": "saved", "iteration": iteration, "directory": str(directory)})
        self._print(f"saved adapter: {directory}")

    def save_failed(self, iteration: int, problem: str) -> None:
        """Record that nothing was saved at ``iteration``; training continues."""
        self._append({"event": "save_failed", "iteration": iteration, "problem": problem})
        self._print(f"save failed at iteration {iteration}: {problem}; earlier saves are intact")

    def stopped(self, iteration: int) -> None:
        """Record that the run was asked to stop and did, before its end."""
        self._append({"event": "stopped", "iteration": iteration})

    def _append(self, event: dict[str, Any]) -> None:
        """Write an event, after those that a full disk has kept from being written so far."""
        if self._path is None:
            return
        self._pending += json.dumps(event | {"time": round(time.time(), 3)}) + "\n"
        try:
            with self._path.open("ab", buffering=0) as stream:
                self._pending = self._pending[_write(stream, self._pending.encode()) :]
        except OSError as error:
            self._print(f"{self._path} cannot be written at the moment: {error}")

    def _at(self, iteration: int) -> str:
        return f"iteration {iteration:>{len(str(self._train_iters))}}/{self._train_iters}"

    def _print(self, line: str) -> None:
        if self._path is not None:
            self._printer.line(line)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process so far, on its GPU or otherwise on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_host_memory_bytes()


def _write(stream: FileIO, text: bytes) -> int:
    """Return how many bytes were written: all of them, or fewer if the disk is full."""
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
