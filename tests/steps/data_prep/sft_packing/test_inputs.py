"""Files: which are read, in which order, and where each row stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.blend import Dataset
from nemotron.steps.data_prep.sft_packing.inputs import list_files, read_rows
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError


def names(path: Path | str) -> list[str]:
    return [file.name for file in list_files(Dataset(name="d", path=str(path)))]


def test_list_files_reads_a_directory_by_name_without_manifest_and_hidden_files(
    tmp_path: Path,
) -> None:
    for name in ("b.jsonl", "a.json", "artifact.json", ".c.jsonl", "readme.md"):
        (tmp_path / name).write_text("{}")
    assert names(tmp_path) == ["a.json", "b.jsonl"]
    assert names(tmp_path / "*.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("none.jsonl", "does not exist"), ("x.txt", "neither .jsonl nor .json"), ("", "holds no")],
)
def test_list_files_names_data_that_is_missing(tmp_path: Path, name: str, problem: str) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "x.txt").touch()
    with pytest.raises(NemotronError, match=problem) as caught:
        names(directory / name)
    assert caught.value.code == "missing_training_data"


def test_read_rows_counts_lines_and_keeps_reading_after_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 1}', b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a": 2}']
    file.write_bytes(b"\n".join(lines))
    rows = list(read_rows(file))
    assert [(row.place, row.position) for row in rows] == [("line", n) for n in (1, 3, 4, 5, 6)]
    assert [rows[0].value, rows[4].value] == [{"a": 1}, {"a": 2}]
    reasons = [row.value.reason for row in rows if isinstance(row.value, BadRowError)]
    assert reasons == ["malformed_json", "invalid_unicode", "malformed_json"]


def test_read_rows_takes_a_json_file_as_list_or_as_lines(tmp_path: Path) -> None:
    as_list, as_lines = tmp_path / "list.json", tmp_path / "lines.json"
    as_list.write_text(' [{"a": 1},\n {"a": 2}]')
    as_lines.write_text('{"a": 1}\n{"a": 2}\n')
    assert [(row.place, row.position) for row in read_rows(as_list)] == [("item", 0), ("item", 1)]
    assert [(row.place, row.position) for row in read_rows(as_lines)] == [("line", 1), ("line", 2)]
    assert [row.value for row in read_rows(as_list)] == [row.value for row in read_rows(as_lines)]


def test_read_rows_names_the_line_where_a_json_list_breaks(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    file.write_text('[{"a": 1},\n{"a": ]')
    with pytest.raises(NemotronError, match="not a JSON list") as caught:
        list(read_rows(file))
    assert caught.value.code == "bad_rows"
    assert caught.value.where == f"{file}:2"
