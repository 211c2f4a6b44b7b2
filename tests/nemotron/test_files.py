"""nemotron.files: a file is what it was, or what it is to be."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron.files import write_atomically


def test_a_file_is_replaced_with_the_permissions_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    write_atomically(path, "new", mode=0o600)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_bytes_that_are_not_utf_8_stay_themselves(tmp_path: Path) -> None:
    content = b"caf\xe9\r\n"
    write_atomically(tmp_path / "a", content.decode("utf-8", "surrogateescape"))
    assert (tmp_path / "a").read_bytes() == content


def test_writers_at_once_leave_one_of_their_files_and_nothing_else(tmp_path: Path) -> None:
    texts = [str(number) * 10_000 for number in range(32)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_atomically(tmp_path / "a", text), texts))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() in texts


def test_what_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
