"""A new file, written from its beginning or at places, by one thread or several."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from nemotron.steps._formats import output_file
from nemotron.steps._formats.output_file import OutputFile


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 70_000_000, 5, 2_500_000, 0, 7]])
def test_what_is_written_lies_one_after_the_other(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [Random(size).randbytes(size) for size in sizes]
    with OutputFile(tmp_path / "file") as file:
        assert [file.write(piece) for piece in pieces] == sizes
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.size_bytes == sum(sizes)


def test_threads_write_at_places_of_their_own_and_the_disk_begins_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[OutputFile] = []
    begin = OutputFile._begin_to_write_out
    monkeypatch.setattr(output_file, "_WRITE_OUT_BYTES", 50_000)
    monkeypatch.setattr(
        OutputFile, "_begin_to_write_out", lambda file: (begun.append(file), begin(file))
    )
    content = Random(0).randbytes(1_000_000)
    starts = list(range(0, len(content), 1000))
    Random(1).shuffle(starts)
    with OutputFile(tmp_path / "file") as file, ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda start: file.write_at(start, content[start : start + 1000]), starts))
    assert (tmp_path / "file").read_bytes() == content
    assert file.size_bytes == len(content)
    assert len(begun) == 20


def test_what_is_written_may_be_changed_at_once(tmp_path: Path) -> None:
    block = bytearray(1000)
    with OutputFile(tmp_path / "file") as file:
        for value in range(20):
            block[:] = bytes([value]) * len(block)
            file.write(memoryview(block))
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(bytes([value]) * 1000 for value in range(20))
