"""nemotron.launch.slurm_jobs: what Slurm's commands say, from stand-ins on PATH that say it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import NemotronError
from nemotron.jobs import Placement
from nemotron.launch import slurm_jobs
from nemotron.launch.host import Host
from nemotron.launch.script import BATCH_MARK
from nemotron.launch.slurm_jobs import SlurmHandle

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the stand-ins; Slurm has forgotten the job and keeps no accounts."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    says(directory, "scontrol", FORGOTTEN)
    says(directory, "sacct", NO_ACCOUNTING)
    return directory


def says(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def handle(tmp_path: Path) -> SlurmHandle:
    job = tmp_path / "job"
    (job / "code").mkdir(parents=True)
    return SlurmHandle(Placement(executor="slurm", id="7", name="nemotron-x", directory=str(job)))


def shown(state: str, code: str = "0:0", restarts: int = 0) -> str:
    line = f"JobId=7 JobName=x JobState={state} Reason=None Restarts={restarts} ExitCode={code}"
    return f"echo '{line} NodeList=n[1-2]'"


@pytest.mark.parametrize(
    ("state", "code", "status", "exit_code"),
    [
        ("PENDING", "0:0", "queued", None),
        ("CONFIGURING", "0:0", "queued", None),
        ("RUNNING", "0:0", "running", None),
        ("COMPLETING", "0:0", "running", None),
        ("COMPLETED", "0:0", "succeeded", 0),
        ("FAILED", "4:0", "failed", 4),
        ("FAILED", "75:0", "preempted", 75),
        ("FAILED", "137:0", "failed", 8),
        ("FAILED", "0:11", "failed", 8),
        ("CANCELLED", "0:15", "cancelled", 130),
        ("TIMEOUT", "0:0", "preempted", 75),
        ("PREEMPTED", "0:0", "preempted", 75),
        ("NODE_FAIL", "0:0", "failed", 8),
        ("OUT_OF_MEMORY", "0:125", "failed", 8),
        ("BOOT_FAIL", "0:0", "failed", 9),
        ("SOMETHING_NEW", "0:0", "failed", 1),
    ],
)
def test_every_state_of_slurm_has_a_status_and_an_exit_code(
    commands: Path, handle: SlurmHandle, state: str, code: str, status: str, exit_code: int | None
) -> None:
    says(commands, "scontrol", shown(state, code))
    found = handle.state()
    assert (found.status, found.exit_code) == (status, exit_code)
    if exit_code not in (None, 0, 75):
        assert found.error is not None
        assert found.error["exit_code"] == exit_code


def test_a_job_that_slurm_could_not_start_was_not_killed(
    commands: Path, handle: SlurmHandle
) -> None:
    # As of a log that the compute node cannot open: slurmd says signal 53, which nobody sent.
    says(commands, "scontrol", shown("FAILED", "0:53"))
    found = handle.state()
    assert (found.status, found.exit_code) == ("failed", 9)
    assert found.error is not None
    assert "n[1-2] could not start the job" in found.error["problem"]
    assert handle.placement.directory in found.error["fix"]


def test_slurm_is_asked_ever_more_rarely_and_at_once_when_the_job_has_left_its_end(
    commands: Path, handle: SlurmHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "MOST_SECONDS", 60.0)
    handle.poll_seconds = 0.02
    says(commands, "scontrol", f"echo asked >> asked; {shown('RUNNING')}")
    end = time.monotonic() + 1
    while time.monotonic() < end:
        assert handle.state().status == "running"
    # After 0, 0.04, 0.12, 0.28, 0.6 and, on a slow machine fewer times, 1.24 seconds.
    assert 1 < Path("asked").read_text().count("asked") < 7
    (Path(handle.placement.directory) / "code" / "exit.0").write_text("0\n")
    says(commands, "scontrol", shown("COMPLETED"))
    assert handle.state().status == "succeeded"


def test_slurm_is_asked_again_soon_when_it_did_not_answer_or_was_told_to_cancel(
    commands: Path, handle: SlurmHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "MOST_SECONDS", 60.0)
    says(commands, "scontrol", "exit 1")
    assert handle.state().status == "unknown"
    says(commands, "scontrol", shown("PENDING"))
    assert handle.state().status == "queued"
    says(commands, "scancel", "true")
    handle.cancel()
    says(commands, "scontrol", shown("CANCELLED"))
    assert handle.state().status == "cancelled"


def test_the_last_lines_of_a_start_that_ends_after_its_restart_is_counted_are_read(
    commands: Path, handle: SlurmHandle
) -> None:
    says(commands, "scontrol", shown("PENDING", restarts=1))
    handle.state()
    log = Path(handle.placement.directory) / "log-nemotron-x_7_0.out"
    log.write_text("told to stop\n")
    assert handle.new_output() == b"told to stop\n"
    log.write_text("told to stop\nsaved iter_0000010\n")
    assert handle.new_output() == b"saved iter_0000010\n"


def test_the_log_of_a_start_that_is_long_over_is_read_to_its_end_and_left(
    commands: Path, handle: SlurmHandle
) -> None:
    logs = [
        Path(handle.placement.directory) / f"log-nemotron-x_7_{restart}.out"
        for restart in (0, 1, 2)
    ]
    says(commands, "scontrol", shown("RUNNING", restarts=2))
    handle.state()
    for log in logs:
        log.write_text(f"{log.name}\n")
    assert handle.new_output().decode() == "".join(f"{log.name}\n" for log in logs)
    for log in logs:
        log.write_text(f"{log.name}\nmore\n")
    assert handle.new_output() == b"more\n" * 2


def test_accounting_answers_where_scontrol_has_forgotten(
    commands: Path, handle: SlurmHandle
) -> None:
    batch = Path(handle.placement.directory).parent / "make_sbatch.sh"
    ours = ["PREEMPTED|0:0|sbatch --parsable {0}", "CANCELLED by 0|0:15|sbatch --parsable {0}"]
    lines = [line.format(batch) for line in ours]
    # Earlier and later jobs of the same number.
    lines = ["FAILED|9:0|sbatch /elsewhere/job.sh", *lines, "RUNNING|0:0|sbatch /elsewhere/job.sh"]
    says(commands, "sacct", "\n".join(f"echo '{line}'" for line in lines))
    found = handle.state()
    assert (found.status, found.exit_code, found.restarts) == ("cancelled", 130, 1)


@pytest.mark.parametrize("words", ["", "garbage", "|||", "\\377\\376"])
def test_what_cannot_be_read_is_unknown_and_not_an_end(
    commands: Path, handle: SlurmHandle, words: str
) -> None:
    for name in ("scontrol", "sacct"):
        says(commands, name, f"printf '{words}'")
    assert handle.state().status == "unknown"


def test_a_job_is_not_judged_by_its_files_while_slurm_does_not_answer(
    commands: Path, handle: SlurmHandle
) -> None:
    says(commands, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    (Path(handle.placement.directory) / "code" / "exit.0").write_text(
        "143\n"
    )  # may be queued again
    assert handle.state().status == "unknown"


def test_a_job_that_slurm_has_forgotten_and_that_left_no_end_is_lost(
    commands: Path, handle: SlurmHandle
) -> None:
    found = handle.state()
    assert (found.status, found.exit_code) == ("lost", 8)
    assert found.error is not None
    assert found.error["code"] == "job_lost"


def test_an_end_that_shows_up_late_is_the_end(commands: Path, handle: SlurmHandle) -> None:
    end = Path(handle.placement.directory) / "code" / "exit.0"
    says(commands, "sacct", f"[ ! -e asked ] || echo 0 > {end}; touch asked; exit 1")
    assert handle.state().status == "succeeded"


def test_the_ends_of_a_job_are_read_by_one_command(
    commands: Path, handle: SlurmHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = Host.run

    def counted(host: Host, command: Sequence[str], **options: Any) -> Any:
        said.append(command[0])
        return run(host, command, **options)

    monkeypatch.setattr(Host, "run", counted)
    (Path(handle.placement.directory) / "code" / "exit.5").write_text("0\n")
    assert (handle.state().restarts, said) == (5, ["scontrol", "sacct", "sh"])


def test_the_end_is_read_from_what_the_job_left(commands: Path, handle: SlurmHandle) -> None:
    code = Path(handle.placement.directory) / "code"
    error = {"code": "bad_rows", "problem": "two rows", "exit_code": 4}
    (code / "error.0.json").write_text(json.dumps(error))
    (code / "exit.0").write_text("143\n")
    found = handle.state()
    assert (found.status, found.exit_code, found.error) == ("failed", 4, error)


def test_the_end_is_that_of_the_last_time_that_the_job_ran(
    commands: Path, handle: SlurmHandle
) -> None:
    code = Path(handle.placement.directory) / "code"
    (code / "exit.0").write_text("143\n")  # told to stop when it was queued again
    (code / "exit.10").write_text("0\n")
    (code / "exit.9").write_text("143\n")
    found = handle.state()
    assert (found.status, found.exit_code, found.restarts) == ("succeeded", 0, 10)


def test_the_log_begins_below_the_mark_and_comes_once(commands: Path, handle: SlurmHandle) -> None:
    says(commands, "scontrol", shown("RUNNING"))
    handle.state()
    directory = Path(handle.placement.directory)
    batch, log = directory / "sbatch_nemotron-x_7.out", directory / "log-nemotron-x_7_0.out"
    batch.write_text("+ head_node=n1\n")
    assert handle.new_output() == b""
    batch.write_text(f"+ head_node=n1\n{BATCH_MARK} 1\nno such module\n")
    log.write_text("one\n")
    assert handle.new_output() == b"no such module\none\n"
    log.write_text("one\ntwo\n")
    assert handle.new_output() == b"two\n"


def test_the_log_of_a_job_that_was_queued_again_has_no_trace_of_any_start(
    commands: Path, handle: SlurmHandle
) -> None:
    says(commands, "scontrol", shown("COMPLETED", restarts=1))
    handle.state()
    trace = f"\nexport PYTHONUNBUFFERED=1\n+ export PYTHONUNBUFFERED=1\n{BATCH_MARK} 1\n"
    batch = Path(handle.placement.directory) / "sbatch_nemotron-x_7.out"
    batch.write_text(f"{trace}queued again\n{trace}done\n")
    assert handle.new_output(is_last=True) == b"queued again\ndone\n"


def test_a_batch_shell_that_never_came_to_us_is_shown_at_the_end(
    commands: Path, handle: SlurmHandle
) -> None:
    batch = Path(handle.placement.directory) / "sbatch_nemotron-x_7.out"
    batch.write_text("bash: cannot fork\n")
    assert handle.new_output() == b""
    assert handle.new_output(is_last=True) == b"bash: cannot fork\n"


def test_a_command_that_hangs_is_left(commands: Path) -> None:
    says(commands, "scontrol", "exec sleep 60")
    with pytest.raises(NemotronError) as caught:
        Host().run(["scontrol", "show"], timeout=0.2)
    assert caught.value.code == "host_silent"


def test_a_command_that_fails_keeps_its_words(commands: Path) -> None:
    with pytest.raises(NemotronError, match="failed with 1: Slurm accounting storage is disabled"):
        Host().require(["sacct"])
