"""nemotron.launch: real processes on this host, and the record that they leave."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nemotron import jobs, launch
from nemotron.catalog import find_step
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Job, JobRecord
from nemotron.launch import Console, Submission
from nemotron.plan import JobPlan, build
from nemotron.processes import start_of
from nemotron.profile import load_profile


class Terminal:
    """A console whose output can be read back."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.stdout, self.stderr = io.BytesIO(), io.BytesIO()
        self.console = Console(["nemotron", "x"], self.said.append, self.stdout, self.stderr)


def plan(step: str, *overrides: str, config: str = "default", **options: object) -> JobPlan:
    return build(find_step(step), config=config, overrides=overrides, **options)  # type: ignore[arg-type]


def run(job: JobPlan) -> tuple[Submission, JobRecord, Terminal]:
    terminal = Terminal()
    submission = launch.submit(job, terminal.console)
    return submission, jobs.read_job(submission.job.path).record, terminal


def wait_for(condition: object, seconds: float = 20.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_run_streams_its_output_and_records_its_success(demo: Path) -> None:
    submission, record, terminal = run(plan("demo/make"))
    assert submission.exit_code == 0
    assert terminal.stdout.getvalue() == b"making\n"
    assert Path(record.log).read_bytes() == b"making\n"
    assert (record.status, record.exit_code, record.error) == ("succeeded", 0, None)
    assert record.argv == ["nemotron", "x"]
    assert record.command[-1] == f".nemotron/jobs/{record.id}/train.yaml"
    assert (demo / "out" / "make" / "made.txt").is_file()


def test_the_job_reads_the_resolved_config_that_is_recorded(demo: Path) -> None:
    submission, record, _ = run(plan("demo/make", r"output_dir=a=\${b}"))
    assert submission.exit_code == 0
    assert record.config["output_dir"] == "a=${b}"
    assert (demo / "a=${b}" / "made.txt").is_file()


def test_the_job_gets_its_environment(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "green")
    run(plan("demo/make", "run.env.env_vars.OMP_NUM_THREADS=3"))
    assert (demo / "out/make/made.txt").read_text().splitlines() == ["green", "3"]


def test_startup_commands_reach_the_job_and_end_it_when_they_fail(demo: Path) -> None:
    run(plan("demo/make", "run.env.startup_commands=['export COLOUR=\"deep blue\"']"))
    assert (demo / "out/make/made.txt").read_text().startswith("deep blue")
    submission, _, _ = run(plan("demo/make", "run.env.startup_commands=['false']"))
    assert submission.exit_code == 1


def test_what_stands_after_the_dashes_reaches_the_run_module(demo: Path) -> None:
    _, _, terminal = run(plan("demo/make", passthrough=["--extra"]))
    assert terminal.stdout.getvalue() == b"extra\nmaking\n"


def test_an_error_of_the_step_keeps_its_exit_code_and_is_printed_once(demo: Path) -> None:
    submission, record, terminal = run(plan("demo/make", "behaviour=refuse"))
    assert submission.exit_code == ExitCode.DATA
    assert terminal.stderr.getvalue().count(b"error[too_odd]") == 1
    assert not any("error[" in line for line in terminal.said)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["code"] == "too_odd"
    assert b"error[too_odd]" in Path(record.log).read_bytes()


def test_a_job_that_says_nothing_is_explained_with_its_log(demo: Path) -> None:
    submission, record, terminal = run(plan("demo/make", "behaviour=crash"))
    assert submission.exit_code == 3
    assert record.error is not None
    assert record.error["code"] == "job_failed"
    assert f"where: .nemotron/jobs/{record.id}/log.txt" in terminal.said[-1]


def test_a_job_that_is_killed_exits_with_8_and_names_the_signal(demo: Path) -> None:
    submission, record, terminal = run(plan("demo/make", "behaviour=die"))
    assert submission.exit_code == ExitCode.RANK_DIED
    assert "SIGKILL" in terminal.said[-1]
    assert record.error is not None
    assert record.error["code"] == "job_killed"


def test_a_job_that_was_stopped_and_saved_exits_with_75(demo: Path) -> None:
    submission, record, _ = run(plan("demo/make", "behaviour=stop"))
    assert submission.exit_code == ExitCode.PREEMPTED
    assert (record.status, record.error) == ("preempted", None)


def test_a_stray_process_that_holds_the_pipes_does_not_hold_the_launcher(demo: Path) -> None:
    started = time.monotonic()
    submission, _, _ = run(plan("demo/make", "behaviour=spill"))
    assert submission.exit_code == 0
    assert time.monotonic() - started < 30  # the stray one sleeps for 60


def left_by(end: str) -> dict[str, int]:
    """Run a job that starts processes as torchrun starts ranks and then does ``end``.

    Returns:
        What they are, and the number of each.
    """
    sleep = "exec sleep 60'"
    Path("tree.sh").write_text(
        f"""setsid sh -c 'echo rank $$ >> pids; sleep 60 & echo worker $! >> pids; {sleep} &
        setsid sh -c 'echo apart $$ >> pids; {sleep} > apart 2>&1 &
        NEMOTRON_JOB=other setsid sh -c 'echo other $$ >> pids; {sleep} &
        until [ "$(wc -l < pids)" -eq 4 ]; do sleep 0.1; done 2> /dev/null
        {end}"""
    )
    run(plan("demo/make", 'run.env.startup_commands=[". ./tree.sh"]'))
    lines = (line.split() for line in Path("pids").read_text().splitlines())
    return {name: int(pid) for name, pid in lines}


def running(pids: dict[str, int]) -> set[str]:
    return {name for name, pid in pids.items() if start_of(pid) is not None}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("end", "survivors"),
    [
        ("kill -9 $$", {"apart", "other"}),
        ("exit 0", {"rank", "worker", "apart", "other"}),
    ],
)
def test_the_ranks_of_a_torchrun_that_was_killed_end_with_the_job(
    demo: Path, end: str, survivors: set[str]
) -> None:
    pids = left_by(end)
    try:
        time.sleep(0.5)  # ending takes a moment, and survivors must not end in it
        assert running(pids) == survivors
        assert jobs.list_jobs()[-1].record.status == ("succeeded" if "0" in end else "failed")
    finally:
        for name in running(pids):
            os.kill(pids[name], signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGINT, ExitCode.INTERRUPTED, "interrupted"),
        (signal.SIGTERM, ExitCode.PREEMPTED, "preempted"),
        (signal.SIGUSR1, ExitCode.PREEMPTED, "preempted"),
    ],
)
def test_an_interrupt_reaches_the_job_and_is_recorded(
    demo: Path, number: int, code: int, status: str
) -> None:
    def interrupt() -> None:
        root = demo / ".nemotron" / "jobs"
        wait_for(lambda: any(b"making" in path.read_bytes() for path in root.glob("*/log.txt")))
        os.kill(os.getpid(), number)

    previous = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    submission, record, terminal = run(plan("demo/make", "behaviour=sleep"))
    assert (submission.exit_code, record.status) == (code, status)
    assert (terminal.said[-1] == "interrupted") == (number == signal.SIGINT)
    assert signal.getsignal(number) is previous


def test_a_failed_check_starts_and_writes_nothing(demo: Path) -> None:
    with pytest.raises(NemotronError, match="no packed_parquet"):
        run(plan("demo/train"))
    assert not (demo / ".nemotron").exists()


def test_a_missing_input_is_produced_first(demo: Path) -> None:
    submission, _, terminal = run(plan("demo/use", config="tiny"))
    assert submission.exit_code == 0
    assert (demo / "out" / "use" / "used.txt").is_file()
    assert terminal.said[0] == "demo/use needs demo/make -c tiny, which runs first"
    steps = {job.record.step: job.record.status for job in jobs.list_jobs()}
    assert steps == {"demo/make": "succeeded", "demo/use": "succeeded"}
    _, _, again = run(plan("demo/use", config="tiny"))
    assert not any("runs first" in line for line in again.said)


def test_a_producer_that_fails_ends_the_run_with_its_exit_code(demo: Path) -> None:
    submission, record, terminal = run(plan("demo/use", config="broken"))
    assert submission.exit_code == ExitCode.DATA
    assert terminal.said[-1] == "demo/make -c broken failed; demo/use was not started"
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["code"] == "producer_failed"
    assert not (demo / "out" / "use").exists()


def test_a_producer_that_makes_nothing_is_named(demo: Path) -> None:
    with pytest.raises(NemotronError, match="demo/make -c silent succeeded, but"):
        run(plan("demo/use", config="silent"))
    (job,) = [job for job in jobs.list_jobs() if job.record.step == "demo/use"]
    assert job.record.status == "failed"


def ended(job: Job) -> bool:
    return jobs.read_job(job.path).record.status in jobs.ENDED


def test_a_detached_run_goes_on_in_a_session_of_its_own(
    demo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    submission, record, _ = run(plan("demo/use", config="tiny", is_detached=True))
    assert submission.exit_code is None
    assert record.pid != os.getpid()
    if record.status not in jobs.ENDED:
        assert os.getsid(record.pid) != os.getsid(0)
    wait_for(lambda: ended(submission.job))
    final = jobs.read_job(submission.job.path).record
    assert (final.status, final.exit_code) == ("succeeded", 0)
    assert "demo/make -c tiny, which runs first" in submission.job.log.read_text()
    assert (demo / "out" / "use" / "used.txt").is_file()
    assert capfd.readouterr() == ("", "")


def test_errors_of_a_detached_run_are_in_its_record_and_log(demo: Path) -> None:
    submission, _, _ = run(plan("demo/use", config="silent", is_detached=True))
    wait_for(lambda: ended(submission.job))
    record = jobs.read_job(submission.job.path).record
    assert record.status == "failed"
    assert record.error is not None
    assert record.error["code"] == "producer_output_missing"
    # What the user reads comes after the record.
    wait_for(lambda: "error[producer_output_missing]" in submission.job.log.read_text())


def test_no_secret_is_in_any_file_that_a_run_leaves(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    (demo / "env.toml").write_text('[p]\nsecrets = ["HF_TOKEN"]\n')
    run(build(find_step("demo/make"), profile=load_profile("p"), passthrough=["--extra"]))
    files = [path for path in (demo / ".nemotron").rglob("*") if path.is_file()]
    assert {"job.json", "train.yaml", "log.txt"} <= {path.name for path in files}
    assert not [path for path in files if "hunter2hunter2" in path.read_text()]


@pytest.mark.parametrize(
    ("override", "passthrough", "where"),
    [
        ("output_dir=out/hunter2hunter2", [], "output_dir"),
        ("source=${oc.env:OTHER}", [], "source"),
        ("run.env.env_vars.COLOUR=hunter2hunter2", [], "env_vars.COLOUR"),
        ("run.env.startup_commands=['echo hunter2hunter2']", [], "startup_commands"),
        ("behaviour=ok", ["--hf-token=hunter2hunter2"], "after --"),
    ],
)
def test_a_secret_among_the_values_of_a_local_job_is_refused(
    demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    passthrough: list[str],
    where: str,
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    monkeypatch.setenv("OTHER", "hunter2hunter2")
    with pytest.raises(NemotronError) as caught:
        run(plan("demo/make", override, passthrough=passthrough))
    assert (caught.value.code, caught.value.where) == ("secret_in_job", where)
    assert "MY_PASSWORD" in caught.value.problem
    assert "hunter2" not in str(caught.value)
    assert not (demo / ".nemotron").exists()


def test_ranks_run_under_torchrun_and_the_record_says_so(demo: Path) -> None:
    submission, record, _ = run(plan("demo/train", config="tiny"))
    assert submission.exit_code == 0
    assert sorted(path.name for path in (demo / "out" / "train").iterdir()) == [
        "rank0.txt",
        "rank1.txt",
    ]
    assert json.loads((submission.job.path / "job.json").read_text())["command"] == record.command
    assert "--nproc-per-node" in record.command
