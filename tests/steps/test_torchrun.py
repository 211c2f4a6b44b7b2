"""nemotron.steps._torchrun: real ranks that fail in every way, and the one exit code left."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.steps import _torchrun
from tests.conftest import RunForked

Run = Callable[..., tuple[int | None, str]]
# No torch in the ranks: they only end.
WORKER = """
import json, os, signal, sys, time

path = os.environ["NEMOTRON_ERROR_FILE"]

def report(code, name):
    with open(path + ".partial", "w") as stream:
        json.dump({"code": name, "exit_code": code}, stream)
    os.rename(path + ".partial", path)

rank = int(os.environ["RANK"])
ends = sys.argv[1 + rank]
if ends == "well":
    sys.exit(0)
if ends == "waiting":
    time.sleep(60)
if ends == "refused":
    report(4, "bad_rows")
    sys.exit(4)
if ends == "puzzled":
    report(1, "unexpected")
    time.sleep(60)
if ends == "puzzled at last":
    time.sleep(1)
    report(1, "unexpected")
    sys.exit(1)
if ends == "silent":
    sys.exit(7)
if ends.startswith("told"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    if ends == "told in time":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if ends == "interrupted":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
while ends == "killed late" and not os.path.exists(path):
    time.sleep(0.01)
if ends.startswith("killed"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run(tmp_path: Path, run_forked: RunForked) -> Run:
    """Return a function that runs ranks which end in these ways; as ``run_forked`` does."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)

    def run_ranks(ends: list[str], **environ: str) -> tuple[int | None, str]:
        words = ("--standalone", "--nproc-per-node", str(len(ends)), str(worker), *ends)
        error_file = str(tmp_path / "error.json")
        return run_forked(
            "nemotron.steps._torchrun", *words, NEMOTRON_ERROR_FILE=error_file, **environ
        )

    return run_ranks


@pytest.mark.parametrize(
    ("ends", "code", "shown", "hidden"),
    [
        (["well", "well"], 0, "", "FAILED"),
        # The rank said what is wrong: nothing is added to it.
        (["waiting", "refused"], 4, "", "torch"),
        # Nobody said anything: torchrun's account stays.
        (["waiting", "silent"], 7, "exitcode  : 7", "Traceback"),
        (["waiting", "killed"], 8, "error[rank_died]: rank 1 was killed by SIGKILL", "Traceback"),
        # A rank that left is the cause, not the one that then waited for it in vain.
        (["puzzled at last", "well"], 8, "error[rank_died]: rank 1 exited with", "Traceback"),
        # All are told by the one that was, and it takes the time that they take.
        (["told", "told in time"], 75, "", "Traceback"),
        # Told before it could listen: nothing is lost.
        (["told in time", "waiting"], 75, "", "Traceback"),
        # Told while ranks are being started: nobody is missed.
        (["told in time", *["waiting"] * 23], 75, "", "shutting down"),
        # Ctrl-C: who pressed it knows.
        (["interrupted", "interrupted"], 130, "", "death signal"),
        # What the survivor makes of its lost connection is not the cause.
        (
            ["puzzled", "killed late"],
            8,
            "error[rank_died]: rank 1 was killed by SIGKILL",
            "Traceback",
        ),
    ],
)
def test_the_exit_code_is_that_of_the_first_rank_that_failed(
    run: Run, tmp_path: Path, ends: list[str], code: int, shown: str, hidden: str
) -> None:
    ended_with, printed = run(ends)
    assert ended_with == code, printed
    assert shown in printed
    assert hidden not in printed
    if code == 8:
        record = json.loads((tmp_path / "error.json").read_text())
        assert (record["code"], record["exit_code"], record["rank"]) == ("rank_died", 8, 1)


@pytest.mark.parametrize("name", ["PET_MODULE", "PET_RUN_PATH", "PET_NO_PYTHON", "PET_NNODES"])
def test_the_options_of_another_job_are_not_taken_for_ours(run: Run, name: str) -> None:
    code, printed = run(["well"], **{name: "2"})
    assert code == 0, printed


@pytest.mark.parametrize("ends", ["well", "refused"])
def test_nothing_is_left_in_the_directory_for_temporary_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    (tmp_path / "tmp").mkdir()
    # tempfile may have chosen its directory in the process that is forked.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    run([ends], TMPDIR=str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_segments_of_a_gpus_memory_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in _torchrun._ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    _torchrun._let_segments_grow()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ  # which would count before theirs
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    # Known to monkeypatch, which puts it back.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    _torchrun._let_segments_grow()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
