"""What a run prints: lines, and on a terminal one more that is rewritten as the run goes on."""

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
        """Show a line until the next one; for a terminal."""
        columns = shutil.get_terminal_size().columns
        self._print(text[: columns - 1])  # one that wraps could not be erased
        self._shows_progress = True

    def close(self) -> None:
        """Leave the last progress to be read."""
        if self._shows_progress:
            self._stream.write("\n")
            self._stream.flush()
        self._shows_progress = False

    def _print(self, text: str) -> None:
        self._stream.write(f"{_ERASE}{text}" if self._shows_progress else text)
        self._stream.flush()


class Clock:
    """Tells when a run will be done, by how fast it has gone since it started here."""

    def __init__(self, iteration: int, train_iters: int) -> None:
        self._first, self._train_iters = iteration, train_iters
        self._started = time.monotonic()

    def eta(self, iteration: int) -> timedelta:
        """Return the time from now to the end, once an iteration is done; whole seconds."""
        seconds = (time.monotonic() - self._started) / (iteration - self._first)
        return timedelta(seconds=round(seconds * (self._train_iters - iteration)))
