"""nemotron on a real Slurm: submit, follow, come back, cancel, stop and go on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Nemotron = Callable[..., Any]
Launcher = Callable[..., subprocess.Popen[str]]


def record(job_id: str) -> dict[str, Any]:
    return json.loads((Path(".nemotron") / "jobs" / job_id / "job.json").read_text())


def test_an_attached_job_streams_its_log_and_leaves_a_private_record(
    slurm: Path, nemotron: Nemotron
) -> None:
    with (slurm / "env.toml").open("a") as file:
        file.write("setup_lines = 'srun --ntasks=1 bash -c \"[ ! -t 1 ] || echo a terminal\"'\n")
    done = nemotron("steps", "run", "demo/make", "-r", "rig")
    assert done.code == 0, done.err
    assert "making\n" in done.out
    assert "scontrol show hostnames" not in done.out  # nemo-run's trace is not the job's log
    assert "a terminal" not in done.out  # progress bars are not for logs
    assert (slurm / "out" / "make" / "made.txt").is_file()
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"], job["executor"]) == ("succeeded", 0, "slurm")
    assert job["placement"]["id"].isdigit()
    assert len(job["code"]) == 64
    directory = Path(".nemotron") / "jobs" / job["id"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {0o600}


def test_a_submission_from_inside_of_another_job_is_the_same(
    slurm: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    monkeypatch.setenv("SLURM_CPU_BIND", "map_cpu:0")
    job_id = nemotron("steps", "run", "demo/make", "-b", "rig").out.strip()
    assert nemotron("jobs", "wait", job_id).code == 0
    command = ["scontrol", "-o", "show", "job", record(job_id)["placement"]["id"]]
    facts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "TimeLimit=00:30:00 " in facts


def test_a_failing_job_gives_its_own_exit_code_and_error(slurm: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "demo/make", "-r", "rig", "behaviour=refuse")
    assert done.code == 4
    assert "error[too_odd]: that is odd" in done.out
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"], job["error"]["code"]) == ("failed", 4, "too_odd")


def test_however_a_job_ends_its_code_is_that_of_the_job(slurm: Path, nemotron: Nemotron) -> None:
    with (slurm / "env.toml").open("a") as file:
        file.write('[broken]\nextends = "rig"\n')
        file.write("setup_lines = \"echo 'no such module' >&2; exit 12\"\n")
    run = ("steps", "run", "demo/make", "-b")
    ends = {
        3: nemotron(*run, "rig", "behaviour=crash"),  # without a word
        12: nemotron(*run, "broken"),  # before it came to the step
        75: nemotron(*run, "rig", "behaviour=stop"),  # saved, to go on
    }
    for code, started in ends.items():
        assert nemotron("jobs", "wait", started.out.strip()).code == code
    found = {code: record(started.out.strip()) for code, started in ends.items()}
    assert (found[75]["status"], found[75]["error"]) == ("preempted", None)
    assert found[3]["error"]["code"] == found[12]["error"]["code"] == "job_failed"
    assert "no such module" in nemotron("jobs", "logs", found[12]["id"]).out


def test_a_detached_job_is_followed_and_waited_for_by_its_id(
    slurm: Path, nemotron: Nemotron
) -> None:
    started = nemotron("steps", "run", "demo/make", "-b", "rig", "behaviour=refuse")
    assert started.code == 0, started.err
    job_id = started.out.strip()
    followed = nemotron("jobs", "logs", "-f", job_id)
    assert followed.code == 4
    assert "making\n" in followed.out
    assert nemotron("jobs", "wait", job_id).code == 4
    assert "making\n" in nemotron("jobs", "logs", job_id).out


def test_a_running_job_is_cancelled_and_says_so(
    slurm: Path, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    job_id = nemotron("steps", "run", "demo/make", "-b", "rig", "behaviour=sleep").out.strip()
    until(lambda: "making" in nemotron("jobs", "logs", job_id).out)
    assert nemotron("jobs", "status", job_id, "--json").data["status"] == "running"
    assert nemotron("jobs", "cancel", job_id).code == 0
    assert nemotron("jobs", "wait", job_id).code == 130
    assert record(job_id)["status"] == "cancelled"
    assert nemotron("jobs", "cancel", job_id).code == 0  # again: nothing happens


def test_another_job_that_got_the_same_number_is_not_taken_for_ours(
    slurm: Path, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    ours = nemotron("steps", "run", "demo/make", "-b", "rig", "behaviour=refuse").out.strip()
    until((Path(record(ours)["placement"]["directory"]) / "code" / "exit.0").exists)
    other = nemotron("steps", "run", "demo/make", "-b", "rig", "behaviour=sleep").out.strip()
    until(lambda: "making" in nemotron("jobs", "logs", other).out)
    text = record(ours)
    text["placement"]["id"] = record(other)["placement"]["id"]  # as after Slurm's MaxJobId
    (Path(".nemotron") / "jobs" / ours / "job.json").write_text(json.dumps(text))
    assert nemotron("jobs", "cancel", ours).code == 0
    assert record(ours)["exit_code"] == 4
    assert nemotron("jobs", "status", other, "--json").data["status"] == "running"
    nemotron("jobs", "cancel", other)


def test_what_slurm_refuses_is_said_with_its_words(slurm: Path, nemotron: Nemotron) -> None:
    done = nemotron("steps", "run", "demo/make", "-r", "rig", "run.env.partition=nowhere")
    assert done.code == 9
    assert "invalid partition specified: nowhere" in done.err
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"]) == ("failed", 9)


def test_a_dry_run_prints_the_scripts_that_a_submission_executes(
    slurm: Path, nemotron: Nemotron
) -> None:
    before = sorted(slurm.rglob("*"))
    words = ("steps", "run", "demo/make", "-b", "rig", "run.env.env_vars.COLOUR=dark 'red'")
    scripts = nemotron(*words, "--dry-run", "--json").data["scripts"]
    assert sorted(slurm.rglob("*")) == before
    job_id = nemotron(*words).out.strip()
    directory = Path(record(job_id)["placement"]["directory"])
    batch = (directory.parent / "demo-make_sbatch.sh").read_text()
    assert batch == scripts["sbatch"].replace("nemotron_JOB", f"nemotron_{job_id}").replace(
        "nemotron: job JOB", f"nemotron: job {job_id}"
    )
    launch = (directory / "code" / "launch.sh").read_text()
    assert launch == scripts["launch.sh"].replace("JOB", job_id).replace(
        f"NEMOTRON_{job_id}=", "NEMOTRON_JOB="
    )
    assert nemotron("jobs", "wait", job_id).code == 0
    assert (slurm / "out" / "make" / "made.txt").read_text().startswith("dark 'red'\n")


@pytest.mark.parametrize(("choice", "status"), [("leave", "running"), ("cancel", "cancelled")])
def test_ctrl_c_cancels_or_leaves_the_job_as_asked(
    slurm: Path, nemotron: Nemotron, until: Callable[..., Any], choice: str, status: str
) -> None:
    def press_ctrl_c() -> None:
        logs = ".nemotron/nemo-run/experiments/nemotron/*/*/log-*.out"
        until(lambda: any("making" in path.read_text() for path in slurm.glob(logs)))
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press_ctrl_c)
    pressing.start()
    words = ("steps", "run", "demo/make", "-r", "rig", "behaviour=sleep")
    done = nemotron(*words, "--on-interrupt", choice)
    pressing.join()
    assert done.code == 130, done.err
    (job,) = nemotron("jobs", "list", "--json").data
    assert job["status"] == status, done.err
    if choice == "leave":
        assert f"nemotron jobs logs -f {job['id']}" in done.err
        nemotron("jobs", "cancel", job["id"])


@pytest.fixture
def sbatch(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that makes sbatch these lines, with ``real`` for itself and ``$there``."""

    def becomes(lines: str) -> None:
        script = slurm / "bin" / "sbatch"
        script.parent.mkdir()
        real = shutil.which("sbatch")
        is_version = '[ "$1" = --version ] && exit'
        there = f"there={shlex.quote(str(slurm))}"
        real = f'real() {{ {real} "$@"; }}'
        script.write_text("\n".join(["#!/bin/sh", is_version, there, real, lines, ""]))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return becomes


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        (("-r", "rig", "--on-interrupt", "cancel"), "INT", "cancelled"),
        (("-r", "rig", "--on-interrupt", "leave"), "INT", "running"),
        (("-r", "rig", "--on-interrupt", "cancel"), "HUP", "running"),
        (("-b", "rig"), "INT", "running"),
    ],
)
def test_a_signal_while_sbatch_answers_loses_no_job(
    nemotron: Nemotron,
    until: Callable[..., Any],
    sbatch: Callable[[str], None],
    words: tuple[str, ...],
    number: str,
    status: str,
) -> None:
    sbatch(f'real "$@" && kill -s {number} {os.getpid()}')
    done = nemotron("steps", "run", "demo/make", *words, "behaviour=sleep")
    assert done.code == 130, done.err
    (job,) = nemotron("jobs", "list", "--json").data
    until(lambda: nemotron("jobs", "status", job["id"], "--json").data["status"] == status)
    assert record(job["id"])["placement"]["id"].isdigit()
    if status == "running":
        assert f"nemotron jobs logs -f {job['id']}" in done.err
        nemotron("jobs", "cancel", job["id"])


def test_ctrl_c_of_a_terminal_does_not_reach_sbatch(
    slurm: Path,
    nemotron: Nemotron,
    launcher: Launcher,
    until: Callable[..., Any],
    sbatch: Callable[[str], None],
) -> None:
    # It is taken, and its answer takes a moment; the terminal tells the whole group.
    sbatch(
        'answer=$(real "$@"); kill -s INT -- "-$(cat "$there/group")"; sleep 0.5; echo "$answer"'
    )
    words = ("steps", "run", "demo/make", "-b", "rig", "behaviour=sleep")
    with launcher(*words, start_new_session=True) as process:
        Path("group").write_text(str(process.pid))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (job,) = nemotron("jobs", "list", "--json").data
    until(lambda: nemotron("jobs", "status", job["id"], "--json").data["status"] == "running")
    assert f"nemotron jobs logs -f {job['id']}" in err
    nemotron("jobs", "cancel", job["id"])


@pytest.mark.parametrize("words", [("cancel",), ("logs", "-f")])
def test_who_asks_while_a_job_is_handed_over_asks_its_scheduler_afterwards(
    slurm: Path,
    nemotron: Nemotron,
    launcher: Launcher,
    until: Callable[..., Any],
    sbatch: Callable[[str], None],
    words: tuple[str, ...],
) -> None:
    sbatch('touch "$there/asked"; until [ -e "$there/answered" ]; do sleep 0.1; done; real "$@"')
    run = ("steps", "run", "demo/make", "-b", "rig", "behaviour=refuse")
    with launcher(*run) as process:
        until(Path("asked").exists)
        (job_id,) = os.listdir(".nemotron/jobs")  # noqa: PTH208
        answer = threading.Timer(1.0, Path("answered").touch)
        answer.start()
        done = nemotron("jobs", *words, job_id)
        process.communicate(timeout=60)
    answer.join()
    assert nemotron("jobs", "wait", job_id).code in (4, 130), done.err
    if words == ("cancel",):
        assert done.code == 0, done.err
        assert process.returncode == 130
    else:
        assert (done.code, "error[too_odd]" in done.out) == (4, True), done.err


def test_a_submission_that_ctrl_c_broke_is_interrupted_and_not_refused(
    nemotron: Nemotron, sbatch: Callable[[str], None]
) -> None:
    sbatch(f"kill -s INT {os.getpid()}; exit 130")
    done = nemotron("steps", "run", "demo/make", "-r", "rig")
    assert done.code == 130, done.err
    (job,) = nemotron("jobs", "list", "--json").data
    assert (job["status"], job["exit_code"], job["placement"]) == ("interrupted", 130, None)


def test_a_launcher_that_is_killed_loses_nothing(
    slurm: Path, nemotron: Nemotron, launcher: Launcher
) -> None:
    with launcher("steps", "run", "demo/make", "-r", "rig", "behaviour=refuse") as process:
        assert process.stderr is not None
        assert "is slurm job" in process.stderr.readline()
        process.kill()
    (job_id,) = os.listdir(".nemotron/jobs")  # noqa: PTH208
    assert nemotron("jobs", "wait", job_id).code == 4


def test_a_job_that_slurm_has_forgotten_is_known_by_what_it_left(
    slurm: Path, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    job_id = nemotron("steps", "run", "demo/make", "-b", "rig", "behaviour=refuse").out.strip()
    directory = Path(record(job_id)["placement"]["directory"])
    until((directory / "code" / "exit.0").exists)
    path = Path(".nemotron") / "jobs" / job_id / "job.json"
    text = json.loads(path.read_text())
    text["placement"]["id"] = "4000000"  # no such job, as after Slurm's MinJobAge
    path.write_text(json.dumps(text))
    assert nemotron("jobs", "wait", job_id).code == 4


def test_a_job_that_slurm_has_forgotten_without_an_end_is_lost_and_waited_for_no_longer(
    slurm: Path, nemotron: Nemotron
) -> None:
    job_id = nemotron("steps", "run", "demo/make", "-b", "rig").out.strip()
    nemotron("jobs", "wait", job_id)
    path = Path(".nemotron") / "jobs" / job_id / "job.json"
    text = record(job_id) | {"status": "running", "exit_code": None}
    text["placement"] |= {"id": "4000000", "directory": "/nowhere"}
    path.write_text(json.dumps(text))
    assert nemotron("jobs", "logs", "-f", job_id).code == 8
    assert record(job_id)["status"] == "lost"
    assert record(job_id)["error"]["code"] == "job_lost"
    assert nemotron("jobs", "wait", job_id).code == 8


def start_now(job_id: str, nemotron: Nemotron, until: Callable[..., Any]) -> None:
    """Wait until a job is queued again, and spare it the two minutes that Slurm lets it wait.

    Not all of them: a credential of the same second as the end of the last start is refused.
    """

    def is_queued_again() -> bool:
        now = nemotron("jobs", "status", job_id, "--json").data
        return now["status"] == "queued" and now["restarts"] == 1

    until(is_queued_again)
    number = record(job_id)["placement"]["id"]
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now+3"], check=True)


def test_a_job_that_stopped_is_queued_again_so_often_and_no_more(
    slurm: Path, nemotron: Nemotron, until: Callable[..., Any]
) -> None:
    words = ("steps", "run", "demo/make", "-b", "rig", "run.env.requeue=true")
    goes_on = nemotron(*words, "behaviour=stop_once").out.strip()
    always = nemotron(*words, "run.env.requeue_limit=1", "behaviour=stop").out.strip()
    for job_id in (goes_on, always):
        start_now(job_id, nemotron, until)
    assert nemotron("jobs", "wait", goes_on).code == 0
    assert nemotron("jobs", "logs", goes_on).out.count("making\n") == 2
    assert nemotron("jobs", "wait", always).code == 75
    assert [record(job_id)["status"] for job_id in (goes_on, always)] == ["succeeded", "preempted"]
    assert [record(job_id)["restarts"] for job_id in (goes_on, always)] == [1, 1]


def test_check_asks_the_cluster_without_submitting(slurm: Path, nemotron: Nemotron) -> None:
    good = nemotron("profiles", "check", "rig")
    assert good.code == 0, good.err
    assert "ok       partition main exists" in good.out
    with (slurm / "env.toml").open("a") as file:
        file.write('[bad]\nextends = "rig"\npartition = "mian"\nmounts = ["/nowhere:/x"]\n')
    bad = nemotron("profiles", "check", "bad")
    assert bad.code == 3
    assert "partition mian is not one of: main" in bad.err
    assert "mount source /nowhere does not exist" in bad.err
