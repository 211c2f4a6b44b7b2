"""Shows a job while it runs: its output, its progress, and the launcher's own messages.

A job must not end because its reader has left (``| head``, a closed terminal): what is left to show
is discarded then, and the exit code is still the job's.

A job writes whole lines, because they also go to its log. If the launcher's own output is a
terminal, a line of progress is shortened and replaces the one before; everything else is passed
through.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol, TextIO

from nemotron.launch import Console, Output

_ERASE = b"\r\x1b[K"
# As the trainer prints it: "iteration 10/60 | lm loss 2.3412 | ... | ETA 0:01:20".
_PROGRESS = re.compile(rb"iteration +\d+/\d+ \| .* \| ETA .*")
_KEPT = re.compile(rb"iteration .*|lm loss .*|.* tokens/s|ETA .*")


@contextlib.contextmanager
def job_console(argv: Sequence[str], *, stdout: TextIO) -> Iterator[Console]:
    """Yield the console that shows a job while it runs, whether or not somebody still reads it.

    Args:
        argv: The command line, as the job's record has it.
        stdout: Where the job's stdout goes.
    """
    with rewriting(lasting(stdout), lasting(sys.stderr)) as (out, err):
        yield Console(argv, say, out, err)


class TerminalOutput(Output, Protocol):
    """A stream that knows whether it is a terminal."""

    def isatty(self) -> bool:
        """Return whether it is."""
        ...


def lasting(stream: TextIO) -> TerminalOutput:
    """Return a stream that passes a job's output to ``stream`` until that fails, then drops it."""
    return _Lasting(stream)


def say(text: str) -> None:
    """Tell the user something on stderr, if it can still be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_reader(sys.stderr)


def show(text: str) -> None:
    """Print the result of a command whose exit code must not depend on whether it was read."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        forget_reader(sys.stdout)


def forget_reader(stream: TextIO) -> None:
    """Discard all further output of a stream, also what Python flushes when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def last_lines(stream: Output, count: int) -> Output:
    """Return a stream that passes on the last lines of the first block, and all later blocks."""
    return _LastLines(stream, count)


@contextlib.contextmanager
def rewriting(stdout: TerminalOutput, stderr: Output) -> Iterator[tuple[Output, Output]]:
    """Yield streams for a job's stdout and stderr; the given ones if stdout is no terminal."""
    if not stdout.isatty():
        yield stdout, stderr
        return
    progress = _Progress(stdout)
    try:
        yield progress, _Beside(progress, stderr)
    finally:
        progress.close()


class _Lasting:
    """An output that never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream.isatty()

    def write(self, block: bytes) -> None:
        with self._forgetting():
            self._stream.buffer.write(block)

    def flush(self) -> None:
        with self._forgetting():
            self._stream.buffer.flush()

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # EPIPE of a pipe, EIO of a terminal, ENOSPC of a file
            forget_reader(self._stream)


class _LastLines:
    """Stdout of ``jobs logs``: what is in the log so far comes as the first block."""

    def __init__(self, stream: Output, count: int) -> None:
        self._stream = stream
        self._count: int | None = count

    def write(self, block: bytes) -> None:
        if self._count is not None and block:
            lines = io.BytesIO(block).readlines()  # a bar that redraws itself is one line
            block = b"".join(lines[-self._count :])
            self._count = None
        self._stream.write(block)

    def flush(self) -> None:
        self._stream.flush()


class _Progress:
    """Stdout on a terminal: lines of progress replace each other."""

    def __init__(self, stream: Output) -> None:
        self._stream = stream
        self._is_shown = False
        self._rest = b""

    def write(self, block: bytes) -> None:
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            if _PROGRESS.fullmatch(line):
                self._show(line)
            else:
                self.erase()
                self._stream.write(line + b"\n")
        if not b"iteration ".startswith(self._rest[:10]):  # it will be no line of progress
            self.erase()
            self._stream.write(self._rest)
            self._rest = b""

    def flush(self) -> None:
        self._stream.flush()

    def erase(self) -> None:
        """Erase the progress, so that something else can be written there."""
        if self._is_shown:
            self._stream.write(_ERASE)
        self._is_shown = False

    def close(self) -> None:
        """Leave the last progress on the screen, and write what came without a newline."""
        if self._is_shown:
            self._stream.write(b"\n")
        self._stream.write(self._rest)
        self._stream.flush()
        self._is_shown, self._rest = False, b""

    def _show(self, line: bytes) -> None:
        columns = shutil.get_terminal_size().columns
        kept = b" | ".join(part for part in line.split(b" | ") if _KEPT.fullmatch(part))
        self.erase()
        self._stream.write(kept[: columns - 1])
        self._is_shown = True


class _Beside:
    """Stderr on the same terminal: erases the progress before it writes."""

    def __init__(self, progress: _Progress, stream: Output) -> None:
        self._progress, self._stream = progress, stream

    def write(self, block: bytes) -> None:
        self._progress.erase()
        self._progress.flush()
        self._stream.write(block)

    def flush(self) -> None:
        self._stream.flush()
