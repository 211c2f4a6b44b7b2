"""What is shown of a job while it runs: its output, its progress, and what the launcher says.

A job must not end because whoever read of it has left (``| head``, a closed terminal): what is left
to be shown goes nowhere then, and the exit code is the job's.

A job writes lines, since they go to its log too. Where the launcher's own output is a terminal, a
line of progress is shortened and takes the place of the one before; everything else passes through.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, TextIO, cast

from nemotron.launch import Console

_ERASE = b"\r\x1b[K"
# As the trainer prints it: "iteration 10/60 | lm loss 2.3412 | ... | ETA 0:01:20".
_PROGRESS = re.compile(rb"iteration +\d+/\d+ \| .* \| ETA .*")
_KEPT = re.compile(rb"iteration .*|lm loss .*|.* tokens/s|ETA .*")


@contextlib.contextmanager
def job_console(argv: Sequence[str], *, stdout: TextIO) -> Iterator[Console]:
    """Yield where a job is shown while it runs, and outlasts who reads it.

    Args:
        argv: The command line, as the job's record has it.
        stdout: Where the job's stdout goes.
    """
    with rewriting(lasting(stdout), lasting(sys.stderr)) as (out, err):
        yield Console(argv, say, out, err)


def lasting(stream: TextIO) -> BinaryIO:
    """Return what a job's output is written to: ``stream``, for as long as it takes any."""
    return cast(BinaryIO, _Lasting(stream))


def say(text: str) -> None:
    """Tell the user something on stderr, if there still is one."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_reader(sys.stderr)


def show(text: str) -> None:
    """Print the result of a command whose exit code says something else than that it was read."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        forget_reader(sys.stdout)


def forget_reader(stream: TextIO) -> None:
    """Let what is left for a stream go nowhere, also what Python writes at its own end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def last_lines(stream: BinaryIO, count: int) -> BinaryIO:
    """Return a stream that passes on the last lines of the first block, and all that follows."""
    return cast(BinaryIO, _LastLines(stream, count))


@contextlib.contextmanager
def rewriting(stdout: BinaryIO, stderr: BinaryIO) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield what a job's stdout and stderr are written to; both as given where no terminal is."""
    if not stdout.isatty():
        yield stdout, stderr
        return
    progress = _Progress(stdout)
    try:
        # A job's output is written and flushed, which is all that these can do.
        yield cast(BinaryIO, progress), cast(BinaryIO, _Beside(progress, stderr))
    finally:
        progress.close()


class _Lasting:
    """Writes bytes, which is all that is done with a job's output, and never fails."""

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
    """Stdout of a log, which comes in one block as far as it is written."""

    def __init__(self, stream: BinaryIO, count: int) -> None:
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
    """Stdout, line by line."""

    def __init__(self, stream: BinaryIO) -> None:
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
        """Take the progress away, so that something else can stand there."""
        if self._is_shown:
            self._stream.write(_ERASE)
        self._is_shown = False

    def close(self) -> None:
        """Leave the last progress to be read, and what came without a newline at its end."""
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
    """Stderr, on the same terminal."""

    def __init__(self, progress: _Progress, stream: BinaryIO) -> None:
        self._progress, self._stream = progress, stream

    def write(self, block: bytes) -> None:
        self._progress.erase()
        self._progress.flush()
        self._stream.write(block)

    def flush(self) -> None:
        self._stream.flush()
