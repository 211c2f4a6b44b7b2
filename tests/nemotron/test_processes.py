"""nemotron.processes: a pid alone names no process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest

from nemotron.processes import (
    _parents,
    _parents_from_ps,
    _start_from_ps,
    available_cores,
    descendants,
    runs,
    start_of,
)


def wait_until_zombie(pid: int) -> None:
    end = time.monotonic() + 10
    while start_of(pid) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_cores_are_counted_where_the_system_does_not_bind_processes_to_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)  # as on macOS
    assert available_cores() == os.cpu_count()


def test_a_process_is_told_from_another_with_its_pid() -> None:
    start = start_of(os.getpid())
    assert start is not None
    assert runs(os.getpid(), start)
    assert runs(os.getpid(), None)
    assert not runs(os.getpid(), f"{start}0")


def test_two_processes_have_starts_of_their_own() -> None:
    with subprocess.Popen(["sleep", "60"]) as first:
        time.sleep(0.05)  # starts are counted in hundredths of a second
        with subprocess.Popen(["sleep", "60"]) as second:
            assert start_of(first.pid) != start_of(second.pid)
            first.kill()
            second.kill()


def test_one_that_has_ended_is_gone_also_before_its_parent_asks() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    wait_until_zombie(pid)
    assert not runs(pid, None)
    os.waitpid(pid, 0)
    assert not runs(pid, None)


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_ps_knows_the_same_where_there_is_no_proc() -> None:
    assert _start_from_ps(os.getpid()) is not None
    with subprocess.Popen(["true"]) as child:
        wait_until_zombie(child.pid)
        assert _start_from_ps(child.pid) is None
    assert _start_from_ps(child.pid) is None


def test_descendants_are_found_in_sessions_of_their_own() -> None:
    script = "setsid sh -c 'sleep 60 & echo $!; echo $$; wait' & echo $!; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(3)}
        found = descendants(parent.pid)
        assert set(found) >= pids
        for pid in {*found, parent.pid}:
            with contextlib.suppress(ProcessLookupError):  # a shell ends with its child
                os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_ps_knows_parents_too() -> None:
    assert _parents_from_ps()[os.getpid()] == _parents()[os.getpid()] == os.getppid()
