"""A file that is hashed while it is written."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest
from blake3 import blake3

from nemotron.steps._formats.hashed_file import HashedFile


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [1 << 20], [(1 << 20) - 1, 1, 1], [3, 70_000_000, 5, 2_500_000, 7]],
)
def test_its_digest_and_size_are_those_of_the_file_whatever_is_written_at_once(
    tmp_path: Path, sizes: list[int]
) -> None:
    pieces = [Random(size).randbytes(size) for size in sizes]
    with HashedFile(tmp_path / "file") as file:
        assert [file.write(piece) for piece in pieces] == sizes
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert file.blake3 == blake3(content).hexdigest()
    assert file.size_bytes == len(content)


def test_what_is_written_may_be_changed_at_once(tmp_path: Path) -> None:
    block = bytearray(3_000_000)
    digest = blake3()
    with HashedFile(tmp_path / "file") as file:
        for value in range(20):
            block[:] = bytes([value]) * len(block)
            digest.update(block)
            file.write(memoryview(block))
    assert file.blake3 == digest.hexdigest()


def test_a_file_that_cannot_be_hashed_fails_where_its_block_ends(tmp_path: Path) -> None:
    file = HashedFile(tmp_path / "file")
    file.write(b"x")  # too little to be hashed yet
    os.truncate(tmp_path / "file", 0)
    with pytest.raises(OSError, match="was cut while it was written"):
        file.__exit__(None, None, None)
    assert file.blake3 == ""


@pytest.mark.parametrize("written", [b"", bytes(5_000_000)])
def test_an_error_of_the_writer_leaves_no_digest_and_no_thread(
    tmp_path: Path, written: bytes
) -> None:
    file = HashedFile(tmp_path / "file")
    file.write(written)
    error = KeyError("mine")
    file.__exit__(KeyError, error, None)
    assert file.blake3 == ""
    assert file._digest.done()
