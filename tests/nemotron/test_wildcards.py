"""Paths with wildcards, and files whose names only look like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron.wildcards import fixed_part, is_there, passes_by


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/empty").mkdir(parents=True)
    for name in ("chats-1.jsonl", "odd[1].jsonl"):
        Path("data", name).touch()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("data", True),
        ("data/empty", False),
        ("data/gone.jsonl", False),
        ("data/chats-*.jsonl", True),
        ("data/gone-*.jsonl", False),
        ("data/odd[1].jsonl", True),  # as a pattern it would match odd1.jsonl only
    ],
)
def test_what_a_path_names_is_found(path: str, found: bool) -> None:
    assert is_there(path) is found


def test_a_path_is_fixed_up_to_its_first_wildcard_or_as_a_whole_if_it_exists() -> None:
    assert fixed_part("data/*/chats/*.jsonl") == Path("data")
    assert fixed_part("data/odd[1].jsonl") == Path("data/odd[1].jsonl")


def test_a_pattern_passes_by_an_output_that_it_cannot_match() -> None:
    assert passes_by("data/chats-*.jsonl", Path("data/output"))
    assert not passes_by("data/*", Path("data/output"))
    assert not passes_by("data/chats-*.jsonl", Path("elsewhere"))
