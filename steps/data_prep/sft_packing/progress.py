"""Shows the progress of a stage: a line that is rewritten on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time

from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.executors import Outcome

_TERMINAL_INTERVAL_S = 0.2


class Progress:
    """Shows how many rows and tokens of a stage are done, how fast, and when it will end.

    Args:
        stage: Name of the stage, such as ``tokenize``.
        total_bytes: Work of all tasks.
        num_tasks: Number of tasks.
        interval_s: Seconds between plain lines.
    """

    def __init__(self, stage: str, *, total_bytes: int, num_tasks: int, interval_s: float) -> None:
        self._stage = stage
        self._total_bytes = max(total_bytes, 1)
        self._num_tasks = num_tasks
        self._is_terminal = sys.stdout.isatty()
        self._interval_s = _TERMINAL_INTERVAL_S if self._is_terminal else interval_s
        self._start = self._last = time.monotonic()
        self._done = self._done_before = 0
        self._bytes = self._bytes_before = 0
        self._rows = self._tokens = 0
        self._peak_bytes = 0

    def advance(self, outcome: Outcome, *, size_bytes: int, rows: int, tokens: int) -> None:
        """Count a finished task; one that an earlier run has done does not count for the speed."""
        self._done += 1
        self._bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, outcome.peak_bytes)
        if outcome.was_done:
            self._done_before += 1
            self._bytes_before += size_bytes
        else:
            self._rows += rows
            self._tokens += tokens
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self._say(self._line(now - self._start))

    def finish(self) -> None:
        """Show how long the stage took, unless it ended before the first line was due."""
        seconds = time.monotonic() - self._start
        if self._is_terminal:
            sys.stdout.write("\r\x1b[K")
        if self._done_before:
            again = f"{self._done_before} of {self._num_tasks} tasks were done by an earlier run"
            print(f"{STEP}: {self._stage}: {again}", flush=True)
        if seconds >= self._interval_s:
            peak = f"peak memory per worker {self._peak_bytes / 2**20:,.0f} MiB"
            print(f"{self._line(seconds)}, {peak}", flush=True)

    def _line(self, seconds: float) -> str:
        here = self._bytes - self._bytes_before
        left = (self._total_bytes - self._bytes) * seconds / here if here else None
        end = "" if left is None else f", {_duration(left)} left"
        return (
            f"{STEP}: {self._stage} {self._bytes / self._total_bytes:.0%}, "
            f"{self._rows:,} rows, {self._rows / seconds:,.0f} rows/s, "
            f"{self._tokens / seconds:,.0f} tokens/s{end}"
        )

    def _say(self, line: str) -> None:
        if self._is_terminal:
            sys.stdout.write(f"\r\x1b[K{line}")
            sys.stdout.flush()
        else:
            print(line, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
