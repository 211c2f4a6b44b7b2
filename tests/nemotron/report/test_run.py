"""nemotron.report.run: what the records of a run come to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron import catalog
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Job
from nemotron.report import read_run, report_data
from nemotron.report.page import report_page
from nemotron.report.run import config_difference, summary
from tests.nemotron.report.conftest import START, step

WriteMetrics = Callable[..., Path]


def test_the_summary_has_the_figures_of_the_run(write_metrics: WriteMetrics) -> None:
    figures = summary(read_run(str(write_metrics("out"))))
    assert figures["name"] == "out"
    assert (figures["iterations"], figures["train_iters"]) == (4, 8)
    assert (figures["first_loss"], figures["last_loss"]) == (3.0, 0.75)
    assert (figures["best_valid_loss"], figures["best_iteration"]) == (2.5, 4)
    assert (figures["tokens"], figures["supervised_tokens"]) == (400, 100)
    assert (figures["tokens_per_second"], figures["tflops_per_rank"]) == (200.0, 0.25)
    assert figures["peak_memory_bytes"] == 3 * 2**30
    assert figures["status"] is None
    json.dumps(figures, allow_nan=False)


def test_saves_are_where_the_run_lies_now(write_metrics: WriteMetrics, tmp_path: Path) -> None:
    saved = {"event": "saved", "iteration": 5, "directory": "/elsewhere/out/iter_0000005"}
    out = write_metrics("out", rest=json.dumps(saved) + "\n").rename(tmp_path / "moved")
    assert read_run(str(out)).saves[-1] == (5, str(out / "iter_0000005"))


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "3", True, 10**400])
def test_what_was_lost_of_a_line_is_left_out_and_the_rest_reported(
    write_metrics: WriteMetrics, value: object
) -> None:
    lost = {"lm_loss": value, "grad_norm": value, "seconds": value, "time": value}
    events = [
        step(5) | lost,
        {"event": "validation", "iteration": 5, "lm_loss": value},
        {"event": "saved", "iteration": 5},
        {"event": "stopped", "iteration": 5, "time": value, "config": value},
        {"iteration": 5},
    ]
    rest = "".join(json.dumps(event) + "\n" for event in events)
    run = read_run(str(write_metrics("out", rest=rest, optimizer={"clip_grad": math.inf})))
    figures = summary(run)
    assert (figures["iterations"], figures["last_loss"]) == (5, 0.75)
    assert (figures["step_seconds"], figures["last_valid_loss"]) == (2.0, 2.5)
    assert figures["saves"][-1] == {"iteration": 5, "directory": ""}
    assert run.config["train.train_iters"] == 8
    json.dumps(report_data(run, read_run(str(write_metrics("other")))), allow_nan=False)
    assert "stopped on request" in report_page(run)


def test_a_run_is_found_by_its_job_and_by_its_directory(
    write_metrics: WriteMetrics, job: Callable[..., Job]
) -> None:
    directory = write_metrics("out")
    record = job("out", ended=9.0, code=0).record
    by_job, by_directory = read_run(record.id[-6:]), read_run("out")
    assert (by_job.name, by_directory.name) == (record.id, "out")
    assert by_job.directory == by_directory.directory == directory
    assert by_job.status == by_directory.status == "succeeded"


def test_the_steps_are_read_no_more_often_where_there_are_many_jobs(
    write_metrics: WriteMetrics, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_metrics("out")
    for _ in range(5):
        job("out", ended=9.0, code=0)
    find_steps, calls = catalog.find_steps, []
    monkeypatch.setattr(catalog, "find_steps", lambda: calls.append(1) or find_steps())
    assert read_run("out").status == "succeeded"
    assert len(calls) == 1


def test_what_happened_is_told_in_order_from_metrics_and_jobs(
    write_metrics: WriteMetrics, job: Callable[..., Job]
) -> None:
    resumed = {"event": "resumed", "iteration": 4, "time": START + 20, "directory": "iter_0000004"}
    failed = {"event": "save_failed", "iteration": 5, "time": START + 21, "problem": "disk full"}
    stopped = {"event": "stopped", "iteration": 5, "time": START + 22}
    rest = "".join(json.dumps(event) + "\n" for event in (resumed, failed, stopped))
    write_metrics("out", rest=rest)
    job("out", ended=-5.0, code=0)  # of an earlier run in the same directory
    died = {"code": "rank_died", "problem": "rank 1 was killed by SIGKILL"}
    killed = job("out", ended=10.0, code=8, error=died).record.id
    preempted = job("out", ended=23.0, code=75).record.id
    job("elsewhere", ended=24.0, code=0)
    run = read_run("out")
    assert [each.text for each in run.timeline] == [
        "started",
        f"job {killed} failed: [rank_died] rank 1 was killed by SIGKILL",
        "resumed from iter_0000004",
        "save failed: disk full",
        "stopped on request",
        f"job {preempted} preempted",
    ]
    assert run.status == "preempted"


def test_a_job_whose_launcher_was_killed_is_not_the_last_one_for_ever(
    write_metrics: WriteMetrics, job: Callable[..., Job]
) -> None:
    write_metrics("out")
    job("out", lost_since=-100.0)  # of an earlier run, which made room for this one
    began = job("out", lost_since=-5.0).record.id
    went_on = job("out", ended=30.0).record.id
    run = read_run("out")
    assert run.status == "succeeded"
    told = [f"job {began} lost", "started", f"job {went_on} succeeded"]
    assert [each.text for each in run.timeline] == told


def test_the_last_line_of_a_run_that_goes_on_may_be_half_written(
    write_metrics: WriteMetrics,
) -> None:
    write_metrics("out", rest=json.dumps(step(5)) + "\n" + json.dumps(step(6))[:40])
    assert summary(read_run("out"))["iterations"] == 5


def test_two_configs_are_compared_key_by_key(write_metrics: WriteMetrics) -> None:
    write_metrics("one", optimizer={"lr": 0.1}, peft={"dim": 8})
    write_metrics("two", optimizer={"lr": 0.2}, peft={"dim": 8, "alpha": 16})
    one, two = read_run("one"), read_run("two")
    assert config_difference(one, two) == {
        "checkpoint.save": ("one", "two"),
        "optimizer.lr": (0.1, 0.2),
        "peft.alpha": (None, 16),
    }
    data = report_data(one, two)
    assert {"key": "optimizer.lr", "run": 0.1, "against": 0.2} in data["config_difference"]
    assert (data["run"]["name"], data["against"]["name"]) == ("one", "two")


def test_a_secret_in_a_config_is_not_shown(write_metrics: WriteMetrics) -> None:
    write_metrics("out", hf_model_path="https://me:hunter2hunter2@example.com/base")
    assert "hunter2" not in str(read_run("out").config)


def test_what_has_no_metrics_is_refused(here: Path, job: Callable[..., Job]) -> None:
    (here / "empty").mkdir()
    for target in ("empty", job("empty", ended=1.0, code=0).record.id):
        with pytest.raises(NemotronError, match=r"no metrics\.jsonl") as caught:
            read_run(target)
        assert (caught.value.code, caught.value.exit_code) == ("no_metrics", ExitCode.DATA)
    with pytest.raises(NemotronError, match="no job 'nowhere'"):
        read_run("nowhere")
