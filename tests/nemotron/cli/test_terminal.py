"""nemotron.cli.terminal: what a real terminal gets, and that nothing else gets it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator

import pytest

from nemotron.cli.terminal import last_lines, rewriting

FIRST = (
    b"iteration  5/60 | lm loss 2.3412 | grad norm 0.523 | lr 3.00e-03 | 12,345 tokens/s | "
    b"3,210 supervised/s | 0.0123 TFLOP/s per rank | ETA 0:01:20\n"
)
SECOND = FIRST.replace(b" 5/60", b"10/60").replace(b"1:20", b"1:00")
SHORT = b"iteration  5/60 | lm loss 2.3412 | 12,345 tokens/s | ETA 0:01:20"
ERASE = b"\r\x1b[K"
END = b"\x00"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bytes]]:
    """Return a function that writes blocks through, and returns what the terminal got."""
    monkeypatch.setenv("COLUMNS", "90")
    master, slave = os.openpty()

    def write(*blocks: bytes, err: bytes = b"") -> bytes:
        with (
            open(slave, "wb", closefd=False) as out,
            open(slave, "wb", closefd=False) as error,
            rewriting(out, error) as (stdout, stderr),
        ):
            for block in blocks:
                stdout.write(block)
                stdout.flush()
            if err:
                stderr.write(err)
                stderr.flush()
        # The kernel hands a terminal's output on when it likes: read up to a mark of our own.
        os.write(slave, END)
        got = b""
        while not got.endswith(END):
            got += os.read(master, 65536)
        return got.removesuffix(END).replace(b"\r\n", b"\n")

    yield write
    os.close(master)
    os.close(slave)


def test_a_line_of_progress_replaces_the_one_before_and_the_last_stays(
    shown: Callable[..., bytes],
) -> None:
    newer = SHORT.replace(b" 5/60", b"10/60").replace(b"1:20", b"1:00")
    assert shown(b"loaded\n" + FIRST, SECOND) == b"loaded\n" + SHORT + ERASE + newer + b"\n"


def test_everything_else_stays_and_takes_the_place_of_progress(
    shown: Callable[..., bytes],
) -> None:
    validation = b"iteration 5/60 | lm loss validation 2.1000 | ppl 8.17\n"
    got = shown(FIRST[:30], FIRST[30:] + validation, b"no newline yet", err=b"warning\n")
    assert got == SHORT + ERASE + validation + b"no newline yet" + b"warning\n"
    assert shown(FIRST, err=b"warning\n") == SHORT + ERASE + b"warning\n"


def test_progress_is_cut_to_the_width_of_the_terminal(
    shown: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert shown(FIRST) == SHORT[:19] + b"\n"


def test_a_file_or_a_pipe_gets_every_byte_as_it_is() -> None:
    out, err = io.BytesIO(), io.BytesIO()
    with rewriting(out, err) as streams:
        assert streams == (out, err)


def test_a_bar_that_redraws_itself_is_one_of_the_last_lines() -> None:
    stream = io.BytesIO()
    last_lines(stream, 2).write(b"one\ntwo\n 10%\r 50%\r100%\r\n")
    assert stream.getvalue() == b"two\n 10%\r 50%\r100%\r\n"
