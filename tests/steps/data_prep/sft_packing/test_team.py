"""Several nodes on one run, as threads of this process: the bytes are those of one node."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import NemotronError
from nemotron.steps._entry import StopRequestedError
from nemotron.steps.data_prep.sft_packing import executors, team
from nemotron.steps.data_prep.sft_packing.engine import EngineMismatchError
from nemotron.steps.data_prep.sft_packing.receipts import Receipt
from nemotron.steps.data_prep.sft_packing.tokenizing import TokenizeTask

RunPacking = Callable[..., Path]
RUN = "nemotron.steps.data_prep.sft_packing.run"
NODE = threading.local()


@pytest.fixture
def corpus(tmp_path: Path, make_rows: Callable[..., list[dict[str, Any]]]) -> Path:
    """Five files of different sizes, so five tasks of the first stage."""
    directory = tmp_path / "data"
    directory.mkdir()
    for number in range(5):
        rows = make_rows(20 + 10 * number, seed=number, max_words=12)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{number}.jsonl").write_text(lines)
    return directory


@pytest.fixture
def run_on_nodes(
    run_packing: RunPacking, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Future[Path]]]:
    """Return a function that runs the step on some of so many nodes at once."""

    def role(work: Path) -> team.Leader | team.Helper | None:
        return team.role_of(work, NODE.environment)

    def run(nodes: list[int], count: int, *words: Any, **settings: Any) -> list[Future[Path]]:
        def on(node: int) -> Path:
            names = ("NODES", "NODE", "JOB", "START")
            values = (str(count), str(node), "job", "0")
            NODE.environment = {
                f"NEMOTRON_{name}": value for name, value in zip(names, values, strict=True)
            }
            return run_packing(*words, **settings)

        with ThreadPoolExecutor(len(nodes)) as pool:
            return [pool.submit(on, node) for node in nodes]

    tokenize, is_free = TokenizeTask.run, threading.Lock()

    def one_at_a_time(task: TokenizeTask) -> tuple[Receipt, bool]:
        with is_free:  # a process has one encoder, and it is at one conversation at a time
            return tokenize(task)

    monkeypatch.setattr(TokenizeTask, "run", one_at_a_time)
    monkeypatch.setattr(f"{RUN}.role_of", role)
    monkeypatch.setattr(team, "_POLL_SECONDS", 0.01)
    return run


@pytest.fixture
def wanted(corpus: Path, run_packing: RunPacking, tmp_path: Path) -> dict[str, bytes]:
    return content(run_packing(corpus, num_shards=3, output_dir=tmp_path / "one"))


def content(packed: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(packed)): path.read_bytes()
        for path in packed.rglob("*")
        if path.is_file()
    }


def test_three_nodes_write_the_bytes_of_one_and_leave_nothing_else(
    corpus: Path,
    wanted: dict[str, bytes],
    run_on_nodes: Callable[..., list[Future[Path]]],
    tmp_path: Path,
) -> None:
    output = tmp_path / "three"
    settings = {"num_shards": 3, "output_dir": output}
    runs = run_on_nodes([0, 1, 2], 3, corpus, **settings, keep_tokens=False)
    assert [run.result() for run in runs] == [output] * 3
    assert content(output) == wanted
    # Again: it is up to date, and the helpers are sent home.
    before = (output / "artifact.json").stat().st_mtime_ns
    runs = run_on_nodes([0, 1, 2], 3, corpus, **settings)
    assert [run.result() for run in runs] == [output] * 3
    assert (output / "artifact.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.glob(".three*")) == [".three.lock"]


def test_an_engine_that_fails_on_one_node_is_left_by_all(
    corpus: Path,
    wanted: dict[str, bytes],
    run_on_nodes: Callable[..., list[Future[Path]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = threading.Event()

    def run_tasks(*words: Any, **settings: Any) -> list[Receipt]:
        if NODE.environment["NEMOTRON_NODE"] == "1" and not failed.is_set():
            failed.set()
            raise EngineMismatchError("one of them errs")
        return executors.run_tasks(*words, **settings)

    monkeypatch.setattr(f"{RUN}.run_tasks", run_tasks)
    runs = run_on_nodes([0, 1], 2, corpus, num_shards=3, output_dir=tmp_path / "two")
    assert content(runs[0].result()) == wanted
    assert runs[1].exception() is None
    assert failed.is_set()


def test_a_node_that_is_told_to_stop_stops_the_others(
    corpus: Path, run_on_nodes: Callable[..., list[Future[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tasks(*words: Any, **settings: Any) -> list[Receipt]:
        if NODE.environment["NEMOTRON_NODE"] == "1":
            raise StopRequestedError
        return executors.run_tasks(*words, **settings)

    monkeypatch.setattr(f"{RUN}.run_tasks", run_tasks)
    for run in run_on_nodes([0, 1], 2, corpus):
        assert isinstance(run.exception(), StopRequestedError)


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_finds_no_other_says_where_it_looked(
    corpus: Path,
    run_on_nodes: Callable[..., list[Future[Path]]],
    monkeypatch: pytest.MonkeyPatch,
    node: int,
) -> None:
    monkeypatch.setattr(team, "_MEET_SECONDS", 0.1)
    (run,) = run_on_nodes([node], 2, corpus)
    with pytest.raises(NemotronError, match="did not join") as caught:
        run.result()
    assert (caught.value.code, caught.value.exit_code) == ("nodes_apart", 3)
    assert "packed.work/nodes-job-0" in str(caught.value.where)


def test_a_node_that_sees_other_inputs_ends_the_run(
    corpus: Path,
    run_on_nodes: Callable[..., list[Future[Path]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def digest(tasks: object) -> str:
        return NODE.environment["NEMOTRON_NODE"]

    monkeypatch.setattr(team, "_digest", digest)
    for run in run_on_nodes([0, 1], 2, corpus):
        with pytest.raises(NemotronError, match="this node sees different inputs to tokenize"):
            run.result()
