"""Blend files: strict keys, and one .json suffix for blends and for data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.blend import Dataset, read_blend
from nemotron.steps.data_prep.sft_packing.inputs import list_files


def read(path: Path | str) -> tuple[Dataset, ...]:
    found = read_blend(str(path), messages_field="messages", tools_field="tools", max_rows=9)
    return found.datasets


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_read_blend_fills_in_what_a_dataset_does_not_say(tmp_path: Path) -> None:
    datasets = [
        {"name": "a", "path": "a.jsonl", "weight": 2, "max_rows": 5, "messages_field": "chat"},
        {"name": "b", "path": "/data/b.jsonl"},
    ]
    first, second = read(write(tmp_path / "blend.json", {"datasets": datasets}))
    assert first.path == str(tmp_path / "a.jsonl")
    assert (first.weight, first.max_rows, first.messages_field) == (2, 5, "chat")
    assert second.path == "/data/b.jsonl"
    assert (second.weight, second.max_rows, second.messages_field) == (1, 9, "messages")


def test_only_what_a_blend_says_is_a_pattern_not_the_directory_that_it_lies_in(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run [1]"
    directory.mkdir()
    for name in ("a.jsonl", "b[2].jsonl"):
        (directory / name).touch()
    datasets = [{"name": name, "path": name} for name in ("*.jsonl", "b[2].jsonl", "no.jsonl")]
    pattern, file, missing = read(write(directory / "blend.json", {"datasets": datasets}))
    assert [path.name for path in list_files(pattern)] == ["a.jsonl", "b[2].jsonl"]
    assert list_files(file) == [directory / "b[2].jsonl"]
    with pytest.raises(NemotronError, match=re.escape(f"{directory}/no.jsonl does not exist")):
        list_files(missing)


@pytest.mark.parametrize("content", [[{"messages": []}], {"messages": []}, {"instruction": "Q"}])
def test_read_blend_takes_json_with_conversations_as_data(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "chat.json", content)
    assert [(item.name, item.path) for item in read(path)] == [("chat", str(path))]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"dataset": []}, "unknown key 'dataset'"),
        (
            {"train": [{"name": "a", "path": "a"}], "datasets": [{"name": "b", "path": "a"}]},
            "either",
        ),
        ({"valid": [{"name": "a", "path": "a"}]}, "train is empty"),
        ({"datasets": []}, "wanted either datasets"),
        ({"datasets": [{"name": "a", "path": "a", "repeat": 0.5}]}, "datasets.0.repeat"),
        ({"datasets": [{"name": "a", "path": "a", "split": "train"}]}, "data set on the hub"),
        ({"datasets": [{"name": "a", "path": "a", "wieght": 1}]}, "datasets.0.wieght"),
        ({"datasets": [{"name": "a", "path": "a", "weight": -1}]}, "datasets.0.weight"),
        ({"datasets": [{"name": "a", "path": "a", "weight": 0}]}, "every dataset has weight 0"),
        ({"datasets": [{"name": "a", "path": "a"}] * 2}, "the name 'a'"),
        ({"datasets": [{"name": "a", "path": "s3://x/y"}]}, "s3://x/y is neither a local path nor"),
    ],
)
def test_read_blend_names_the_entry_that_is_wrong(
    tmp_path: Path, content: Any, problem: str
) -> None:
    with pytest.raises(NemotronError, match=problem) as caught:
        read(write(tmp_path / "blend.json", content))
    assert caught.value.code == "bad_blend"


def test_read_blend_refuses_a_remote_path() -> None:
    with pytest.raises(NemotronError, match="s3://bucket is neither"):
        read("s3://bucket")
