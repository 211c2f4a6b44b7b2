"""Data sets of the hub, from a local cache of the hub's own layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from nemotron.artifacts import read_artifact
from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.blend import Dataset
from nemotron.steps.data_prep.sft_packing.inputs import list_files

FILES = (
    "README.md",
    "data/train-00000-of-00001.jsonl",
    "data/test.jsonl",
    "chat_if/train.jsonl",
    "chat_if.jsonl",
    "trainer.jsonl",
)


@pytest.fixture
def cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_rows: Callable[..., list[dict[str, Any]]]
) -> Path:
    """A cache that holds the data set ``owner/name``, and no network."""
    repository = tmp_path / "hub" / "datasets--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for number, name in enumerate(FILES):
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = make_rows(20, seed=number)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, [name for name in sorted(FILES) if name != "README.md"]),
        ({"split": "train"}, ["chat_if/train.jsonl", "data/train-00000-of-00001.jsonl"]),
        ({"subset": "chat_if"}, ["chat_if.jsonl", "chat_if/train.jsonl"]),
        ({"subset": "chat_if", "split": "train"}, ["chat_if/train.jsonl"]),
    ],
)
def test_subset_and_split_choose_files_by_name(
    cached: Path, values: dict[str, str], names: list[str]
) -> None:
    files = list_files(Dataset.model_validate({"name": "d", "path": "hf://owner/name"} | values))
    assert sorted(str(file.relative_to(cached)) for file in files) == sorted(names)


@pytest.mark.parametrize(
    ("path", "values", "problem"),
    [
        ("hf://owner/name", {"split": "dev"}, "has no file of dev; it has: chat_if.train.jsonl"),
        ("hf://owner/other", {}, "hf://owner/other: "),
        ("hf://owner", {}, "is not hf://owner/name"),
    ],
)
def test_what_is_not_there_is_named(
    cached: Path, path: str, values: dict[str, str], problem: str
) -> None:
    with pytest.raises(NemotronError, match=problem) as caught:
        list_files(Dataset.model_validate({"name": "d", "path": path} | values))
    assert caught.value.code == "missing_training_data"


def test_a_blend_may_name_data_sets_of_the_hub(
    cached: Path, tmp_path: Path, run_packing: Callable[..., Path]
) -> None:
    blend = tmp_path / "blend.json"
    sources = [{"name": "d", "path": "hf://owner/name", "split": "train"}]
    blend.write_text(json.dumps({"datasets": sources}))
    artifact = read_artifact(run_packing(blend), "packed_parquet")
    report = artifact.properties["report"]
    assert report["kept"] == 40
    assert [item.path for item in artifact.inputs] == ["hf://owner/name"]
    files = report["datasets"][0]["files"]
    assert len(files) == 2
    assert all(f"/snapshots/{'a' * 40}/" in file["path"] for file in files)  # the revision
