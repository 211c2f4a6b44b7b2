"""Files: which are read, how they are cut into parts, and where each row stands."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing import rows as rows_module
from nemotron.steps.data_prep.sft_packing.blend import Dataset
from nemotron.steps.data_prep.sft_packing.inputs import cut_into_parts, list_files
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rows import BLANK, Row, read_rows

VALUES = [{"a": number, "text": "é" * number} for number in range(40)]
LINES = "".join(json.dumps(value) + "\n" for value in VALUES).encode()


def names(path: Path | str) -> list[str]:
    return [file.name for file in list_files(Dataset(name="d", path=str(path)))]


def rows_of(file: Path, *, size_bytes: int = 1 << 20) -> list[Row]:
    parts = cut_into_parts(file, size_bytes=size_bytes)
    return [row for part in parts for row in read_rows(part, columns=("a", "text"))]


def values_of(file: Path, **options: Any) -> list[Any]:
    return [row.value for row in rows_of(file, **options)]


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):  # two members, as `cat a.gz b.gz` makes them
        return gzip.compress(content[:100]) + gzip.compress(content[100:])
    return pa.Codec("zstd").compress(content, asbytes=True)


def test_list_files_reads_a_directory_by_name_without_manifest_and_hidden_files(
    tmp_path: Path,
) -> None:
    for name in ("b.jsonl", "a.json", "artifact.json", ".c.jsonl", "readme.md", "c.jsonl.gz"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "d.parquet").touch()
    (tmp_path / "d.parquet.gz").touch()
    assert names(tmp_path) == ["a.json", "b.jsonl", "c.jsonl.gz", "d.parquet"]
    assert names(tmp_path / "*.jsonl") == ["b.jsonl"]


def test_a_file_whose_name_no_record_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    file.touch()
    with pytest.raises(NemotronError, match="is not UTF-8; rename the file") as caught:
        list_files(Dataset(name="d", path=str(tmp_path)))
    assert (caught.value.code, caught.value.where) == ("unreadable_input", "d")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.jsonl", "does not exist"),
        ("x.txt", r"not one of \.jsonl, \.json, \.parquet"),
        ("", "contains no"),
        ("x.jsonl", r"x\.jsonl contains no"),
    ],
)
def test_list_files_names_data_that_is_missing(tmp_path: Path, name: str, problem: str) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "x.txt").touch()
    (directory / "x.jsonl").mkdir()
    with pytest.raises(NemotronError, match=problem) as caught:
        names(directory / name)
    assert caught.value.code == "missing_training_data"


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json.zst", "r.json", "r.json.gz"])
@pytest.mark.parametrize("is_list", [False, True])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, is_list: bool) -> None:
    file = tmp_path / name
    is_list = is_list and ".json" in file.suffixes
    content = json.dumps(VALUES, indent=1).encode() if is_list else LINES
    file.write_bytes(content if file.suffix.startswith(".json") else compressed(name, content))
    assert values_of(file) == VALUES


def test_parquet_is_read_by_row_groups_and_only_the_columns_that_are_asked_for(
    tmp_path: Path,
) -> None:
    file = tmp_path / "r.parquet"
    table = pa.Table.from_pylist([value | {"other": 1} for value in VALUES])
    pq.write_table(table, file, row_group_size=7)
    assert [(part.start, part.stop) for part in cut_into_parts(file, size_bytes=1)] == [
        (number, number + 1) for number in range(6)
    ]
    assert values_of(file) == VALUES


def test_parquet_gives_no_keys_that_a_row_did_not_have(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    messages = [{"role": "user", "name": "x"}, {"role": "tool", "id": 1}]
    pq.write_table(pa.Table.from_pylist([{"a": messages}]), file)
    assert values_of(file) == [{"a": messages}]


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    arguments = pa.map_(pa.string(), pa.string())
    kind = pa.list_(pa.struct({"name": pa.string(), "arguments": arguments, "id": pa.int64()}))
    calls = [
        {"name": "add", "arguments": [("x", "1"), ("y", None)]},
        {"name": "now", "arguments": [], "id": 1},
        {"name": "none"},
    ]
    twice = [{"name": "add", "arguments": [("x", "1"), ("x", "2")]}]
    pq.write_table(pa.table({"a": pa.array([calls, twice, None], kind)}), file)
    first, second, third = values_of(file)
    wanted = [
        {"name": "add", "arguments": {"x": "1", "y": None}},
        {"name": "now", "arguments": {}, "id": 1},
        {"name": "none"},
    ]
    assert first == {"a": wanted}
    assert (second.reason, second.detail) == (
        "unreadable_value",
        "the key 'x' appears twice in one object",
    )
    assert third == {}


@given(size_bytes=st.integers(1, 3000))
def test_lines_are_the_same_however_they_are_cut_into_parts(
    tmp_path_factory: pytest.TempPathFactory, size_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("rows") / "r.jsonl"
    file.write_bytes(LINES.removesuffix(b"\n"))
    parts = cut_into_parts(file, size_bytes=size_bytes)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert values_of(file, size_bytes=size_bytes) == VALUES


def test_read_rows_counts_lines_and_keeps_reading_after_a_bad_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bad = {
        b'{"a": ': "malformed_json",
        b"\xff\xfe": "invalid_unicode",
        b"[" * 1_000_000: "malformed_json",
        b'{"a": NaN}': "malformed_json",
        b'{"a": 1, "a": 2}': "malformed_json",
        b'{"a": "\x00"}': "malformed_json",
    }
    file.write_bytes(b"\n".join([b'\xef\xbb\xbf{"a": 1}', b"", *bad, b'{"a": 2}']))
    rows = [row for row in rows_of(file) if row.value is not BLANK]
    assert [row.position for row in rows] == [0, *range(2, 9)]
    assert [rows[0].value, rows[-1].value] == [{"a": 1}, {"a": 2}]
    found = [row.value.reason for row in rows if isinstance(row.value, BadRowError)]
    assert found == list(bad.values())


def test_a_row_that_is_too_large_is_passed_over_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1000)
    file = tmp_path / "rows.jsonl"
    large = {length: b'"' + b"x" * (length - 3) + b'"\n' for length in (999, 1000, 1001, 4321)}
    file.write_bytes(b"1\n" + b"".join(large.values()) + b"2\n" + large[4321][:-1])
    values = values_of(file, size_bytes=10)
    reasons = [value.reason if isinstance(value, BadRowError) else value for value in values]
    kept = [large[length][1:-2].decode() for length in (999, 1000)]
    assert reasons == [1, *kept, "row_too_large", "row_too_large", 2, "row_too_large"]


def test_a_json_list_is_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_LIST_CHUNK", 16)
    file = tmp_path / "list.json"
    items = [{"text": "é" * 50}, 12345678901234567890, "x", [], None, -1.5, {"a": {"b": [1, "]"]}}]
    for text in (json.dumps(items), json.dumps(items, indent=3, ensure_ascii=False), " [ ] "):
        file.write_text(text, encoding="utf-8")
        assert values_of(file) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n{"a": ]', 2),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},\n\n{"a": 1', 3),
        ('[{"a": 1}]\n[1]', 2),
        ("[1,\n2,\n]", 3),
        ("[,]", 1),
        ("[" * 100_000, 1),
    ],
)
def test_read_rows_names_the_line_where_a_json_list_breaks(
    tmp_path: Path, text: str, line: int
) -> None:
    file = tmp_path / "list.json"
    file.write_text(text)
    with pytest.raises(NemotronError, match="not a JSON list") as caught:
        rows_of(file)
    assert caught.value.code == "malformed_list"
    assert caught.value.where == f"{file}:{line}"
    assert "max_bad_fraction" not in caught.value.fix


@pytest.mark.parametrize("is_cut_up", [False, True])
@pytest.mark.parametrize(
    "item", ["NaN", '{"a": -Infinity}', '{"a": {"b": 1, "b": 2}}', f'{{"a": {"1" * 5000}}}']
)
def test_an_item_of_a_list_that_is_not_json_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: str, *, is_cut_up: bool
) -> None:
    if is_cut_up:
        monkeypatch.setattr(rows_module, "_LIST_CHUNK", 3)
    file = tmp_path / "list.json"
    file.write_text(f'[{{"a": 1}}, {item}, {{"a": 2}}]')
    first, bad, last = (row.value for row in rows_of(file))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(bad, BadRowError)
    assert bad.reason == "malformed_json"


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.jsonl.zst", "r.parquet", "r.json.gz"])
def test_a_file_that_is_cut_short_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(VALUES), file)
        content = file.read_bytes()
    else:
        content = compressed(name, LINES)
    file.write_bytes(content[:-9])
    with pytest.raises(NemotronError) as caught:
        rows_of(file)
    assert (caught.value.code, caught.value.where) == ("unreadable_input", str(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.symlink_to("/proc/self/mem")  # reading its first byte is an I/O error, even for root
    with pytest.raises(NemotronError) as caught:
        rows_of(file)
    assert (caught.value.code, caught.value.where) == ("unreadable_input", str(file))


def test_a_list_over_several_lines_is_told_from_damaged_rows() -> None:
    found = rows_module.parse(b"[\r\n")
    assert isinstance(found, BadRowError)
    assert found.reason == "malformed_json"
    assert "lists are read from .json files" in found.detail
