"""Real ranks that are told to stop, killed, halted, fed bad data, or left without a disk."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron.errors import ExitCode
from nemotron.steps._training.resume import list_saves, verify_save
from tests.conftest import RunForked
from tests.steps.peft.megatron_bridge.conftest import VOCABULARY, convert, write_config, write_packs

Train = Callable[..., Any]
LONG = {"train.train_iters": 100_000, "train.eval_interval": 100_000}
TWO_RANKS = {"recipe.data_parallel_size": 2}
FAULTY_STEP = Path(__file__).with_name("faulty_step.py")


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a plan of which nearly all of the time is spent in evaluations, of 60 rows."""
    packs = tmp_path_factory.mktemp("evaluating") / "packs"
    write_packs(packs, num_valid=60)
    return {
        "dataset.nano3_packed_sft_dir": str(packs),
        "train.eval_interval": 1,
        "train.eval_iters": 1000,
    }


@pytest.fixture(scope="module")
def evaluated(train_here: Train, evaluating: dict[str, Any]) -> Any:
    """Return a run of that plan which nobody stopped."""
    return train_here(**evaluating)


@pytest.mark.parametrize(
    # A scheduler tells torchrun TERM; test_torchrun has that torchrun passes it on.
    ("number", "is_to_rank"),
    [(signal.SIGTERM, True), (signal.SIGUSR1, False)],
)
def test_a_job_that_is_told_to_stop_saves_at_once_and_goes_on_as_if_it_had_not(
    launch: Callable[..., Any],
    train_here: Train,
    evaluating: dict[str, Any],
    evaluated: Any,
    tmp_path: Path,
    number: int,
    is_to_rank: bool,
) -> None:
    plan = {**evaluating, "checkpoint.save": str(tmp_path / "out")}
    job = launch(**plan, **TWO_RANKS)
    ranks = job.ranks(after_steps=2)
    os.kill(ranks[1] if is_to_rank else job.process.pid, number)
    stopped = job.end()
    assert stopped.exit_code == ExitCode.PREEMPTED, stopped.stderr
    assert stopped.error == {}
    reached = len(stopped.losses)
    assert 2 <= reached < 8
    assert stopped.adapter.name == f"iter_{reached:07d}"
    resumed = train_here(**plan)
    assert (resumed.exit_code, evaluated.exit_code) == (0, 0)
    # The first steps were taken by two ranks: sums in another order, as in test_layouts.
    assert resumed.losses == pytest.approx(evaluated.losses, rel=5e-6)
    validations = [e["iteration"] for e in resumed.events if e["event"] == "validation"]
    assert validations == list(range(9))


@pytest.mark.parametrize(
    ("fault", "code", "problem"),
    [
        ("raises", "unexpected", "ValueError: no such thing, after step 2"),
        ("exits", "rank_died", "the rank exited by itself with code 0, after step 2"),
        (
            "vanishes",
            "rank_died",
            "rank 1 exited with code 0 before the others; its last known step was 2",
        ),
        (
            "is_killed",
            "rank_died",
            "rank 1 was killed by SIGKILL; its last known step was 2",
        ),
        ("is_halted", "rank_silent", "rank 1 has done nothing for 3 s; its last step was 2"),
        ("hangs", "rank_silent", "rank 1 has done nothing for 3 s; its last step was 2"),
    ],
)
def test_a_lost_rank_ends_the_job_and_is_named_with_its_step_and_line(
    launch: Callable[..., Any], fault: str, code: str, problem: str
) -> None:
    changes = {**LONG, **TWO_RANKS}
    if code == "rank_silent":  # on a busy machine 3 s of silence may come before a rank's end
        changes["dist.heartbeat_timeout_seconds"] = 3
    job = launch(str(FAULTY_STEP), fault, **changes)
    job.ranks(after_steps=2)
    began = time.monotonic()
    run = job.end()
    # 15 s are promised where nothing else runs (docs/log.md); a collective would wait for 600.
    assert time.monotonic() - began < 60
    assert run.exit_code == run.error["exit_code"] == (1 if fault == "raises" else 8)
    assert (run.error["code"], run.error["problem"]) == (code, problem), run.stderr
    assert run.error["where"] == line_of(fault)
    # The last word is the cause. Only where nobody knew that the rank was not to end is there more.
    assert f"{code}]: {problem}" in run.stderr.rsplit("error[", 1)[1]
    assert run.stderr.count("error[") == (2 if fault == "vanishes" else 1)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_and_names_it(
    launch: Callable[..., Any],
) -> None:
    run = launch(str(FAULTY_STEP), "has_nan", **LONG, **TWO_RANKS).end()
    assert (run.exit_code, run.error["code"]) == (ExitCode.NUMERIC, "loss_not_finite")
    assert run.error["problem"].startswith("iteration 3: loss ")
    assert run.error["problem"].endswith(", gradient norm nan; first on rank(s) [1]")
    assert len(run.losses) == 2


def test_copies_that_drift_apart_stop_the_run_and_are_not_saved(
    launch: Callable[..., Any],
) -> None:
    changes = {"checkpoint.save_interval": 4, "optimizer.lr": 1e-6}
    run = launch(str(FAULTY_STEP), "drifts", **LONG, **TWO_RANKS, **changes).end()
    assert run.exit_code == ExitCode.FAILED
    told = re.fullmatch(
        r"RuntimeError: copies of an adapter differ between ranks by ([\d.]+), after step 4",
        run.error["problem"],
    )
    assert told, run.stderr
    assert float(told[1]) == pytest.approx(0.25, abs=1e-3)  # and two small steps
    assert len(run.losses) == 4
    assert not list(run.output.glob("iter_*"))


def line_of(fault: str) -> str:
    """Return file and line of a fault, which is marked there."""
    lines = FAULTY_STEP.read_text(encoding="utf-8").splitlines()
    (number,) = (n for n, line in enumerate(lines, start=1) if f"# line: {fault}" in line)
    return f"{FAULTY_STEP}:{number}"


def test_what_is_not_finite_on_one_rank_stops_all_before_the_step(
    train: Train, world: Any, tmp_path: Path
) -> None:
    shutil.copytree(world.hf, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.embed_tokens.weight"][VOCABULARY - 1] = torch.nan
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "base")
    write_packs(tmp_path / "packs", rare=VOCABULARY - 1)
    run = train(
        **TWO_RANKS,
        **{
            "checkpoint.pretrained_checkpoint": str(tmp_path / "base"),
            "dataset.nano3_packed_sft_dir": str(tmp_path / "packs"),
            "checkpoint.save_interval": 1,
        },
    )
    assert (run.error["code"], run.error["exit_code"]) == ("loss_not_finite", ExitCode.NUMERIC)
    assert run.error["problem"].startswith(f"iteration {len(run.losses) + 1}: ")
    assert len(run.losses) < 3  # the row is somewhere in the first epoch of three batches
    for directory in run.output.glob("iter_*"):
        adapter = load_file(directory / "adapter_model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())


def test_a_full_disk_costs_the_saves_and_not_the_run(
    train_here: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The largest file of a save has 280 kB; the log of the test and metrics.jsonl have far less.
    plan = {"peft.dim": 64, "scheduler.lr_decay_iters": 8, "checkpoint.save_interval": 2}
    output = {"checkpoint.save": str(tmp_path / "out")}
    good = train_here(**plan, **output, **{"train.train_iters": 4})
    assert good.exit_code == 0
    with largest_file(100_000):
        run = train_here(**plan, **output)
    assert (run.error["code"], run.error["exit_code"]) == ("save_failed", ExitCode.IO)
    assert len(run.losses) == 8
    assert "save failed at iteration 6: [Errno 27]" in capfd.readouterr().out
    assert [iteration for iteration, _ in list_saves(run.output)] == [4, 2]
    verify_save(run.adapter)
    assert not list(run.output.glob(".*.partial"))
    run, whole = train_here(**plan, **output), train_here(**plan)
    assert run.exit_code == 0
    assert run.losses == whole.losses


def test_what_was_saved_survives_kills_at_random_moments(
    world: Any, run_forked: RunForked, tmp_path: Path
) -> None:
    plan = {**LONG, "checkpoint.save_interval": 1, "checkpoint.most_recent_k": 3}
    config = write_config(world, tmp_path, plan)
    script = Path(__file__).with_name("kill_saves.py")
    code, printed = run_forked(str(script), "--config", str(config), "--kills", "15")
    assert code == 0, printed
    assert printed.startswith("15 kills, ")
    assert " 0 lost, " in printed


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Let writes beyond a file's size fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
