"""nemotron.launch.coming_back: coming back to jobs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron import jobs
from nemotron.errors import NemotronError
from nemotron.jobs import Job, Placement
from nemotron.launch import coming_back
from nemotron.launch.remote import State


def left_running(pid: int) -> Job:
    """Return a job as a launcher leaves it that was killed and had this pid."""
    job = jobs.create(
        jobs.new_directory("demo/make"),
        step="demo/make",
        profile=None,
        argv=[],
        command=[],
        values={},
        config_text="",
    )
    job.update(status="running", pid=pid)
    return job


def test_who_has_the_pid_of_a_launcher_that_is_gone_is_not_signalled(
    here: Path, nemotron: Callable[..., Any]
) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        job = left_running(bystander.pid)
        assert nemotron("jobs", "cancel", job.record.id, "--json").data["status"] == "lost"
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.parametrize("command", [["wait"], ["logs", "-f"]])
def test_who_has_the_pid_of_a_launcher_that_is_gone_is_not_waited_for(
    here: Path, nemotron: Callable[..., Any], command: list[str]
) -> None:
    job = left_running(1)
    job.log.write_text("so far\n")
    ended = nemotron("jobs", *command, job.record.id)
    assert (ended.code, "error[job_lost]" in ended.err) == (8, True)
    assert ended.out == ("so far\n" if "logs" in command else "")
    assert nemotron("jobs", "logs", job.record.id).code == 0


def test_a_wait_outlasts_a_scheduler_that_does_not_answer_for_a_moment(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stumbling:
        poll_seconds = 0.0
        said = iter([NemotronError("host_silent", "no answer"), State.ended(4, None, 0)])

        def state(self) -> State:
            if isinstance(found := next(self.said), NemotronError):
                raise found
            return found

    job = left_running(1)
    job.update(placement=Placement(executor="slurm", id="1", name="make", directory="/nowhere"))
    stumbling = Stumbling()
    monkeypatch.setattr(coming_back, "handle_of", lambda _: stumbling)
    assert coming_back.wait(job) == 4
