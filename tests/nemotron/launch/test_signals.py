"""nemotron.launch.signals: a launcher that is asked to stop, at any moment, and what it records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.launch.signals import Interrupts
from nemotron.processes import start_of

Launcher = Callable[..., subprocess.Popen[str]]
INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


def records() -> dict[str, dict[str, Any]]:
    found = map(Path.read_text, Path(".nemotron", "jobs").glob("*/job.json"))
    return {record["step"]: record for record in map(json.loads, found)}


def start(launcher: Launcher, *words: str, **options: Any) -> subprocess.Popen[str]:
    return launcher("steps", "run", *words, stderr=subprocess.STDOUT, **options)


def read_until(run: subprocess.Popen[str], text: str) -> None:
    assert run.stdout is not None
    seen = ""
    while text not in seen:
        line = run.stdout.readline()
        assert line, seen
        seen += line


def end_of(run: subprocess.Popen[str]) -> int:
    run.communicate(timeout=30)
    return run.returncode


def doing(script: str) -> str:
    """Return the argument that makes a job this shell script."""
    Path("doing.sh").write_text(script)
    return 'run.env.startup_commands=[". ./doing.sh"]'


def test_a_terminal_that_closes_lets_the_job_save(demo: Path, launcher: Launcher) -> None:
    run = start(
        launcher, "demo/make", doing("trap 'sleep 1; exit 75' TERM; echo up; sleep 9 & wait")
    )
    read_until(run, "up")
    run.send_signal(HUP)
    time.sleep(0.3)
    run.send_signal(HUP)  # the kernel says it, and the shell
    assert end_of(run) == 75
    assert records()["demo/make"]["status"] == "preempted"


def test_a_run_under_nohup_outlives_its_terminal(demo: Path, launcher: Launcher) -> None:
    def ignore() -> None:
        signal.signal(HUP, signal.SIG_IGN)

    Path("out").mkdir()
    run = start(launcher, "demo/make", "behaviour=hold", preexec_fn=ignore)
    read_until(run, "making")
    run.send_signal(HUP)
    time.sleep(0.3)
    Path("release").touch()
    assert end_of(run) == 0


@pytest.mark.parametrize(
    ("number", "then", "exit_code", "error"),
    [
        (TERM, "exit 0", 0, None),
        (INT, "exit 0", 0, None),
        (TERM, 'cp report.json "$NEMOTRON_ERROR_FILE"; exit 6', 6, "save_failed"),
        (USR1, 'cp report.json "$NEMOTRON_ERROR_FILE"; exit 6', 6, "save_failed"),
        (TERM, "exit 75", 75, None),
        (INT, "exit 75", 75, None),
        (INT, "exit 130", 130, None),
    ],
)
def test_how_a_job_ends_that_was_told_to_stop_is_what_it_says(
    demo: Path, launcher: Launcher, number: int, then: str, exit_code: int, error: str | None
) -> None:
    report = {"code": "save_failed", "problem": "no space", "exit_code": 6}
    Path("report.json").write_text(json.dumps(report))
    run = start(
        launcher, "demo/make", doing(f"trap '{then}' TERM USR1 INT; echo up; sleep 9 & wait")
    )
    read_until(run, "up")
    run.send_signal(number)
    assert end_of(run) == exit_code
    record = records()["demo/make"]
    assert record["exit_code"] == exit_code
    assert (record["error"] and record["error"]["code"]) == error


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize(("number", "code"), [(TERM, 75), (USR1, 75), (HUP, 75), (INT, 130)])
def test_a_job_that_is_stopped_while_it_starts_is_no_failure(
    demo: Path, launcher: Launcher, delay: float, number: int, code: int
) -> None:
    run = start(launcher, "demo/make", "behaviour=sleep")
    read_until(run, "running")
    time.sleep(delay)
    run.send_signal(number)
    assert end_of(run) == code
    assert records()["demo/make"]["exit_code"] == code


@pytest.mark.parametrize(("number", "code"), [(TERM, 75), (INT, 130)])
def test_a_launcher_that_is_stopped_between_two_jobs_starts_no_other(
    demo: Path, launcher: Launcher, number: int, code: int
) -> None:
    run = start(launcher, "demo/use", "-c", "tiny")
    read_until(run, "which runs first")
    run.send_signal(number)
    out, _ = run.communicate(timeout=30)
    assert run.returncode == code, out
    found = records()
    assert {record["exit_code"] for record in found.values()} == {code}
    assert found["demo/use"]["error"] is None
    assert "running demo/use" not in out


def test_the_second_ctrl_c_ends_ranks_that_hang(demo: Path, launcher: Launcher) -> None:
    # As torchrun has it: the rank is in a session of its own, and deaf.
    hanging = """trap '' INT TERM; setsid sh -c 'echo $$ > rank; exec sleep 60' & echo up; wait"""
    run = start(launcher, "demo/make", doing(f"{hanging}; wait; wait"))
    read_until(run, "up")
    end = time.monotonic() + 10
    while not Path("rank").is_file() or not Path("rank").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    rank = int(Path("rank").read_text())
    assert start_of(rank) is not None
    run.send_signal(INT)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(INT)
    assert end_of(run) == 130
    assert records()["demo/make"]["status"] == "interrupted"
    assert start_of(rank) is None


def test_a_signal_in_the_middle_of_an_import_is_an_interrupt_once_that_is_over() -> None:
    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            os.kill(os.getpid(), INT)  # where Python 3.11 makes a RuntimeError of an exception

    with Interrupts() as interrupts:
        interrupts.keep_from_now_on()
        type("Imported", (), {"field": Interrupted()})
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_received()


def test_the_second_ctrl_c_does_not_wait_and_a_closed_terminal_says_it_twice() -> None:
    with Interrupts() as interrupts:
        interrupts.keep_from_now_on()
        for number in (HUP, HUP, TERM, TERM, INT):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), INT)
    assert interrupts.received == [HUP, HUP, TERM, TERM, INT, INT]


def test_what_is_not_kept_interrupts_at_once_and_what_was_ignored_stays_so() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), HUP)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), TERM)
            os.kill(os.getpid(), TERM)  # it does not interrupt what is done about the first
        assert signal.getsignal(HUP) is signal.SIG_IGN
        assert signal.getsignal(TERM) is signal.SIG_DFL
    finally:
        signal.signal(HUP, before)
