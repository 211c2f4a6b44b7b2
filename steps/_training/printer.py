"""Prints a run's lines, and on a terminal a line of progress that is rewritten all the time."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from typing import TextIO

_ERASE = "\r\x1b[K"


class Printer:
    """Prints lines to a stream; a log file or a pipe gets nothing but lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shows_progress = False
        self.is_terminal = stream.isatty()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._print(f"{text}\n")
        self._shows_progress = False

    def progress(self, text: str) -> None:
        """Show a line that the next one replaces; for a terminal."""
        columns = shutil.get_terminal_size().columns
        self._print(text[: columns - 1])  # a line that wraps could not be erased
        self._shows_progress = True

    def close(self) -> None:
        """Leave the last progress on the screen."""
        if self._shows_progress:
            self._stream.write("\n")
            self._stream.flush()
        self._shows_progress = False

    def _print(self, text: str) -> None:
        self._stream.write(f"{_ERASE}{text}" if self._shows_progress else text)
        self._stream.flush()


class Clock:
    """Estimates when a run will be done, from its speed since it was started or resumed."""

    def __init__(self, iteration: int, train_iters: int) -> None:
        self._first, self._train_iters = iteration, train_iters
        self._started = time.monotonic()

    def eta(self, iteration: int) -> timedelta:
        """Return the time that is left once an iteration is done, in whole seconds."""
        seconds = (time.monotonic() - self._started) / (iteration - self._first)
        return timedelta(seconds=round(seconds * (self._train_iters - iteration)))
