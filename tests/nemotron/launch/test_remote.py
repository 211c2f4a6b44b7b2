"""nemotron.launch.remote: what a scheduler says, and the record of it."""

from __future__ import annotations

from pathlib import Path

from nemotron import jobs
from nemotron.jobs import Job
from nemotron.launch.remote import State, note


def create() -> Job:
    return jobs.create(
        jobs.new_directory("demo/make"),
        step="demo/make",
        profile=None,
        argv=[],
        command=[],
        values={},
        config_text="",
        executor="slurm",
    )


def test_an_answer_that_comes_late_does_not_undo_an_end(here: Path) -> None:
    job = create()
    asking = jobs.read_job(job.path)  # in another terminal, before the job ended
    note(job, State.ended(4, {"code": "bad_rows", "problem": "two"}, 1))
    note(asking, State("running", "node1"))
    for found in (job.record, asking.record, jobs.read_job(job.path).record):
        assert (found.status, found.exit_code, found.restarts) == ("failed", 4, 1)


def test_only_what_is_new_is_written(here: Path) -> None:
    job = create()
    note(job, State("running", "node1"))
    written = (job.path / "job.json").stat()
    note(job, State("running", "node1"))
    note(job, State("unknown"))
    assert (job.path / "job.json").stat().st_ino == written.st_ino
    started = job.record.started
    assert started is not None
    note(job, State("running", "node2", restarts=1))
    assert (job.record.started, job.record.restarts) == (started, 1)
