"""nemotron.launch.follow: coming back to jobs of this host."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemotron import jobs
from nemotron.jobs import Job


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


def test_wait_does_not_wait_for_who_has_the_pid_of_a_launcher_that_is_gone(
    here: Path, nemotron: Callable[..., Any]
) -> None:
    job = left_running(1)
    waited = nemotron("jobs", "wait", job.record.id)
    assert (waited.code, "error[job_lost]" in waited.err) == (8, True)
