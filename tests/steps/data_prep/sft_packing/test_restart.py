"""Workers, executors and kills: whatever a run goes through, the bytes are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron.artifacts import read_artifact
from nemotron.errors import NemotronError
from nemotron.steps._entry import StopRequestedError, run_step
from nemotron.steps.data_prep.sft_packing.executors import run_tasks
from nemotron.steps.data_prep.sft_packing.progress import Progress
from nemotron.steps.data_prep.sft_packing.receipts import Receipt
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.step import run
from nemotron.steps.data_prep.sft_packing.team import Stage
from nemotron.steps.data_prep.sft_packing.templates import read_template
from nemotron.steps.data_prep.sft_packing.worker import work
from tests.steps.data_prep.sft_packing.conftest import packed_rows

MakeRows = Callable[..., list[dict[str, Any]]]
RunPacking = Callable[..., Path]


@pytest.fixture
def corpus(tmp_path: Path, make_rows: MakeRows) -> Path:
    """Nine files of different sizes, so nine tasks of the first stage."""
    directory = tmp_path / "data"
    directory.mkdir()
    for number in range(9):
        rows = make_rows(20 + 10 * number, seed=number, max_words=12)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{number}.jsonl").write_text(lines)
    return directory


def content(packed: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(packed)): path.read_bytes()
        for path in sorted(packed.rglob("*"))
        if path.is_file()
    }


def receipts_of(work_directory: Path) -> dict[str, int]:
    """Receipts of the first stage and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in work_directory.glob("tokens/*.json")}


def test_one_two_and_four_workers_and_a_job_array_write_the_same_bytes(
    corpus: Path, run_packing: RunPacking, tmp_path: Path, tokenizer_dir: Path
) -> None:
    outputs = [
        run_packing(corpus, num_workers=number, output_dir=tmp_path / f"by-{number}", num_shards=3)
        for number in (1, 2, 4)
    ]
    wanted = content(outputs[0])
    assert len([name for name in wanted if name.endswith(".parquet")]) == 5
    assert content(outputs[1]) == content(outputs[2]) == wanted
    by_array = tmp_path / "by-array"
    settings = {"num_workers": 1, "output_dir": by_array, "num_shards": 3}
    config = config_of(corpus, tokenizer_dir, **settings)
    with pytest.raises(NemotronError, match="tokenized parts: 0 of 9"):
        work(config, stage="pack", index=0, count=2)
    stages: tuple[tuple[Stage, int], ...] = (("tokenize", 4), ("pack", 2))
    for stage, count in stages:
        for index in reversed(range(count)):
            work(config, stage=stage, index=index, count=count)
    before = receipts_of(tmp_path / ".by-array.work")
    assert content(run_packing(corpus, **settings)) == wanted
    assert receipts_of(tmp_path / ".by-array.work") == before


def config_of(corpus: Path, tokenizer_dir: Path, **overrides: Any) -> Config:
    settings = {
        "blend_path": str(corpus),
        "tokenizer": str(tokenizer_dir),
        "chat_template": None,
        "pack_size": 256,
        "num_shards": 1,
        "num_workers": 1,
        "train_ratio": 0.8,
        "valid_ratio": 0.1,
        "test_ratio": 0.1,
    }
    return Config.model_validate(settings | overrides)


def test_ray_over_two_nodes_writes_the_same_bytes(
    corpus: Path, run_packing: RunPacking, tmp_path: Path, tokenizer_dir: Path
) -> None:
    wanted = {name: held for name, held in content(run_packing(corpus)).items() if "splits" in name}
    config = config_of(
        *(corpus, tokenizer_dir),
        **{"output_dir": tmp_path / "by-ray", "execution_mode": "ray", "num_workers": 1},
    )
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "nemotron.steps.data_prep.sft_packing.step"]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    environment |= {"NEMOTRON_NODES": "2", "NEMOTRON_JOB": "job", "NEMOTRON_START": "0"}
    environment |= {"NEMOTRON_MASTER_ADDR": "127.0.0.1", "NEMOTRON_MASTER_PORT": free_port()}
    nodes = [
        subprocess.Popen(
            [*command, "--config", str(path)],
            env={**environment, "NEMOTRON_NODE": str(node), "NEMOTRON_KEY": "0123" * 8},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "Ray has 2 cores on 2 nodes" in said[0]
    found = content(tmp_path / "by-ray")
    assert {name: held for name, held in found.items() if "splits" in name} == wanted


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_twenty_kills_at_random_moments_leave_the_same_bytes(
    corpus: Path, run_packing: RunPacking, tmp_path: Path, tokenizer_dir: Path
) -> None:
    wanted = content(run_packing(corpus, num_shards=3))
    killed = tmp_path / "killed"
    config = config_of(corpus, tokenizer_dir, output_dir=killed, num_shards=3, num_workers=1)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    script = Path(__file__).with_name("kill_packing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path), "--kills", "20"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills" in done.stdout
    found = content(killed)
    manifest = json.loads(found.pop("artifact.json"))
    assert manifest["properties"] == read_artifact(tmp_path / "packed", "packed_parquet").properties
    assert {**found, "artifact.json": wanted["artifact.json"]} == wanted
    assert not list(tmp_path.glob(".killed.partial"))


def test_another_pack_size_packs_the_same_tokens_and_another_template_does_not(
    corpus: Path, run_packing: RunPacking, tmp_path: Path
) -> None:
    packed = run_packing(corpus)
    before = receipts_of(tmp_path / ".packed.work")
    assert len(before) == 9
    for values in (
        {"pack_size": 128},
        {"algorithm": "concatenative", "seed": 5},
        {"max_doc_tokens": 40, "long_documents": "split"},
        {"train_ratio": 1.0, "valid_ratio": 0.0, "test_ratio": 0.0, "num_shards": 2},
    ):
        run_packing(corpus, **values)
        assert receipts_of(tmp_path / ".packed.work") == before
    run_packing(corpus, chat_template="nano3")
    assert not before.keys() & receipts_of(tmp_path / ".packed.work").keys()
    assert len(receipts_of(tmp_path / ".packed.work")) == 9
    (corpus / "3.jsonl").write_text((corpus / "4.jsonl").read_text())
    run_packing(corpus, chat_template="nano3")
    # Equal content is one task's work.
    assert len(receipts_of(tmp_path / ".packed.work")) == 8
    run_packing(corpus, keep_tokens=False)
    assert not (tmp_path / ".packed.work").exists()
    assert packed.is_dir()


def test_another_special_token_of_the_same_vocabulary_tokenizes_again(
    corpus: Path, run_packing: RunPacking, tmp_path: Path, tokenizer_dir: Path
) -> None:
    copy = shutil.copytree(tokenizer_dir, tmp_path / "copy")
    template = "{{ bos_token }}" + read_template("chatml")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    for token, number in (("<|endoftext|>", 0), ("<|begin_of_text|>", 6)):
        (copy / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": token}))
        packed = run_packing(corpus, tokenizer=str(copy), chat_template=template)
        assert {row["input_ids"][0] for row in packed_rows(packed, "train")} == {number}


def test_a_finished_run_does_nothing_and_says_so_unless_forced(
    corpus: Path,
    run_packing: RunPacking,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = run_packing(corpus)
    before = (packed / "artifact.json").stat().st_mtime_ns

    def refuse(*_: object, **__: object) -> list[Receipt]:
        raise AssertionError("a task was run")

    with monkeypatch.context() as patch:
        patch.setattr("nemotron.steps.data_prep.sft_packing.run.run_tasks", refuse)
        run_packing(corpus)
    assert (packed / "artifact.json").stat().st_mtime_ns == before
    assert "is up to date, nothing to do" in capsys.readouterr().out
    wanted = content(packed)
    run_packing(corpus, force=True)
    assert (packed / "artifact.json").stat().st_mtime_ns > before
    assert content(packed) == wanted


@pytest.mark.parametrize("name", ["splits/train/shard-00000-of-00001.parquet", "rejects.jsonl"])
def test_an_output_that_was_damaged_is_written_again(
    corpus: Path, run_packing: RunPacking, name: str
) -> None:
    packed = run_packing(corpus)
    wanted = content(packed)
    (packed / name).write_bytes(wanted[name][:-1] + b"x")
    assert content(run_packing(corpus)) == wanted


def test_a_spool_that_was_damaged_is_written_again(
    corpus: Path, run_packing: RunPacking, tmp_path: Path
) -> None:
    wanted = content(run_packing(corpus, pack_size=128))
    run_packing(corpus)
    spool = next((tmp_path / ".packed.work" / "tokens").glob("*.tokens"))
    spool.write_bytes(spool.read_bytes()[:-4] + b"\0\0\0\0")
    assert content(run_packing(corpus, pack_size=128)) == wanted


def test_another_seed_or_fewer_shards_leave_no_stale_file_and_no_overlap(
    corpus: Path, run_packing: RunPacking
) -> None:
    run_packing(corpus, num_shards=4)
    packed = run_packing(corpus, num_shards=2, seed=9)
    names = [path.name for path in sorted((packed / "splits" / "train").iterdir())]
    assert names == ["shard-00000-of-00002.parquet", "shard-00001-of-00002.parquet"]
    listed = {entry.path for entry in read_artifact(packed, "packed_parquet").files}
    assert listed == set(content(packed)) - {"artifact.json"}


def test_a_worker_that_dies_is_an_error() -> None:
    with pytest.raises(NemotronError) as caught:
        run_tasks([Dying(), Dying()], num_workers=2, mode="auto", on_done=lambda _: None)
    assert (caught.value.code, caught.value.exit_code) == ("worker_died", 8)


def test_a_run_told_to_stop_ends_with_75_and_the_same_command_goes_on(
    corpus: Path,
    run_packing: RunPacking,
    tmp_path: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.yaml"
    config = config_of(corpus, tokenizer_dir, output_dir=tmp_path / "stopped")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = ("data_prep/sft_packing", Config, run, ["--config", str(path)])
    advance = Progress.advance

    def stop_at_the_third(self: Progress, *arguments: Any, **counts: Any) -> None:
        advance(self, *arguments, **counts)
        if len(receipts_of(tmp_path / ".stopped.work")) == 3:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop_at_the_third)
        assert run_step(*words) == 75
    assert "stopped by SIGUSR1; start it again to continue" in capsys.readouterr().out
    assert not (tmp_path / "stopped").exists()
    assert run_step(*words) == 0
    assert "3 of 9 tasks were done by an earlier run" in capsys.readouterr().out
    found, wanted = content(tmp_path / "stopped"), content(run_packing(corpus))
    assert {**found, "artifact.json": b""} == {**wanted, "artifact.json": b""}


def test_a_signal_does_not_kill_workers_that_are_starting(tmp_path: Path) -> None:
    tasks = [Slow(str(number), tmp_path) for number in range(2)]

    def signal_workers() -> None:
        while len(workers := multiprocessing.active_children()) < 2:
            time.sleep(0.001)
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGTERM)

    signalling = threading.Thread(target=signal_workers)
    signalling.start()
    try:
        run_tasks(tasks, num_workers=2, mode="auto", on_done=lambda _: None)
    finally:
        signalling.join()
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}


def test_workers_told_to_stop_finish_what_they_are_at_and_begin_nothing(tmp_path: Path) -> None:
    tasks = [Slow(str(number), tmp_path) for number in range(12)]

    def stop() -> None:
        while not list(tmp_path.glob("*.begun")):
            time.sleep(0.01)
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid or 0, signal.SIGTERM)

    def told(*_: object) -> None:
        raise StopRequestedError

    before = signal.signal(signal.SIGTERM, told)
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(StopRequestedError):
            run_tasks(tasks, num_workers=2, mode="auto", on_done=lambda _: None)
    finally:
        stopping.join()
        signal.signal(signal.SIGTERM, before)
    begun, done = ({path.stem for path in tmp_path.glob(f"*.{end}")} for end in ("begun", "done"))
    assert begun == done != set()
    assert len(done) < 6


@dataclass(frozen=True)
class Slow:
    """A task that takes its time."""

    key: str
    directory: Path
    size_bytes: int = 1

    def run(self) -> tuple[Receipt, bool]:
        (self.directory / f"{self.key}.begun").touch()
        time.sleep(0.3)
        (self.directory / f"{self.key}.done").touch()
        return {}, False


class Dying:
    """A task that ends its process."""

    size_bytes = 1
    key = ""
    directory = Path()

    def run(self) -> tuple[Receipt, bool]:
        os._exit(9)


def test_an_error_in_a_worker_is_the_runs_error(corpus: Path, run_packing: RunPacking) -> None:
    (corpus / "list.json").write_text("[1, ")
    with pytest.raises(NemotronError, match="not a JSON list") as caught:
        run_packing(corpus, num_workers=2)
    assert caught.value.code == "malformed_list"
    assert caught.value.fix


@contextmanager
def few_open_files(more: int) -> Iterator[None]:
    """Let this process open only a few files more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(len(used) + more) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more - 1] + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_groups_and_spools_of_any_size_pack_every_document_once(
    corpus: Path, run_packing: RunPacking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small limits stand for a large corpus: several spools a task, several groups a file."""
    monkeypatch.setattr("nemotron.steps.data_prep.sft_packing.spool.MAX_TOKENS", 500)
    monkeypatch.setattr("nemotron.steps.data_prep.sft_packing.stages.GROUP_TOKENS", 5000)
    with few_open_files(24):
        small = run_packing(corpus, output_dir=tmp_path / "small", num_shards=3, pack_size=1024)
    assert len(list((tmp_path / ".small.work" / "tokens").glob("*.tokens"))) > 48
    monkeypatch.undo()
    large = run_packing(corpus, num_shards=1, pack_size=1024)
    counts = [
        read_artifact(packed, "packed_parquet").properties["splits"] for packed in (small, large)
    ]
    for split in ("train", "valid", "test"):
        for name in ("conversations", "documents", "tokens", "supervised_tokens"):
            assert counts[0][split][name] == counts[1][split][name]
