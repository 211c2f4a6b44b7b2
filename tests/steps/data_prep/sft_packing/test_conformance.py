"""The faster engine: used where it is proven equal, and nowhere else."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nemotron.steps.data_prep.sft_packing import conformance
from nemotron.steps.data_prep.sft_packing.conformance import trial_strings, usable_engine
from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer, load_tokenizer

TINY = Path(__file__).parents[4] / "steps" / "_tiny" / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nemotron" / "engines"


def contractions(directory: Path, tokenizer_dir: Path) -> ChatTokenizer:
    """A tokenizer with a normalizer before its byte-level rules, on which kitoken differs."""
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFKC"}
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (directory / name).write_text((tokenizer_dir / name).read_text())
    Tokenizer.from_str(json.dumps(content)).save(str(directory / "tokenizer.json"))
    return load_tokenizer(str(directory))


def test_the_trial_has_ten_thousand_strings_of_every_kind() -> None:
    strings = trial_strings(("<|im_end|>",))
    assert len(strings) == 10_000
    assert strings == trial_strings(("<|im_end|>",))
    for part in ("don't", "<|im_end|>", "東京", "\r\n", "\u3000"):
        assert sum(part in text for text in strings) > 50


def test_an_engine_that_passes_is_used_and_its_verdict_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(TINY))
    assert usable_engine(tokenizer, "kitoken") == "kitoken"
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(conformance, "find_difference", None)  # not called again
    assert usable_engine(tokenizer, "kitoken") == "kitoken"


def test_processes_that_end_the_trial_at_once_all_keep_their_verdict(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the nodes of a job do, with a cache that they share."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    tokenizer = load_tokenizer(str(TINY))

    def find_none(_: object) -> None:
        barrier.wait()

    monkeypatch.setattr(conformance, "find_difference", find_none)

    def ask() -> None:
        try:
            answers.put(usable_engine(tokenizer, "kitoken"))
        except BaseException as error:  # what it is, a child cannot assert
            answers.put(repr(error))

    for _ in range(10):
        shutil.rmtree(cache, ignore_errors=True)
        children = [context.Process(target=ask) for _ in range(4)]
        for child in children:
            child.start()
        assert [answers.get(timeout=60) for _ in children] == ["kitoken"] * 4
        for child in children:
            child.join()
        assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("held", ["", "{}", "[", "no directory"])
def test_a_verdict_that_cannot_be_kept_or_read_is_found_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    tokenizer = load_tokenizer(str(TINY))
    monkeypatch.setattr(conformance, "find_difference", lambda _: None)
    assert usable_engine(tokenizer, "kitoken") == "kitoken"
    (verdict,) = cache.iterdir()
    verdict.write_text(held)
    if held == "no directory":
        shutil.rmtree(cache)
        cache.write_text("a file is in the way")
    assert usable_engine(tokenizer, "kitoken") == "kitoken"


def test_a_tokenizer_on_which_it_differs_falls_back_and_says_why(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = contractions(tmp_path, tokenizer_dir)
    assert usable_engine(tokenizer, "kitoken") == "tokenizers"
    said = capsys.readouterr().out
    assert "not using kitoken: it differs from tokenizers on" in said
    assert usable_engine(tokenizer, "kitoken") == "tokenizers"
    assert capsys.readouterr().out == said


def test_both_engines_write_the_same_shards(
    make_rows: Callable[..., list[dict[str, Any]]],
    write_rows: Callable[..., Path],
    run_packing: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = write_rows(make_rows(200))
    options = {"tokenizer": str(TINY), "chat_template": "chatml"}
    outputs = [
        run_packing(source, output_dir=tmp_path / name, tokenization={"engine": name}, **options)
        for name in ("tokenizers", "kitoken")
    ]
    first, second = (
        [path.read_bytes() for path in sorted(packed.rglob("*.parquet"))] for packed in outputs
    )
    assert first == second


def test_a_difference_met_while_working_ends_its_use_and_changes_nothing(
    make_rows: Callable[..., list[dict[str, Any]]],
    write_rows: Callable[..., Path],
    run_packing: Callable[..., Path],
    tmp_path: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    tokenizer = contractions(tmp_path / "other", tokenizer_dir)
    rows = make_rows(120, max_turns=1)  # prompt, answer, prompt, ...: it must meet the answers too
    for row in rows:
        row["messages"][-1]["content"] += " it \n'text"
    source = write_rows(rows)
    options = {"tokenizer": str(tokenizer.directory), "chat_template": "chatml"}
    wanted = run_packing(source, output_dir=tmp_path / "wanted", **options)
    monkeypatch.setattr(conformance, "find_difference", lambda _: None)  # a trial that saw nothing
    found = run_packing(
        source, output_dir=tmp_path / "found", tokenization={"engine": "kitoken"}, **options
    )
    assert "kitoken and tokenizers differ, continuing with tokenizers" in capsys.readouterr().out
    for path in wanted.rglob("*.parquet"):
        assert (found / path.relative_to(wanted)).read_bytes() == path.read_bytes()
