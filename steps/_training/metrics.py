"""What a run says: ``metrics.jsonl``, the truth, and a line now and then for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        """Record one optimizer step; ``iteration`` counts from 1."""
        self._append({"event": "step", "iteration": iteration, **values})
        is_shown = iteration % self._log_interval == 0 or iteration in (1, self._train_iters)
        if is_shown:
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

    def _append(self, event: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")

    def _print(self, line: str) -> None:
        if self._path is not None:
            print(line, flush=True)
