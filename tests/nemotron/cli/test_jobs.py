"""``nemotron jobs``: list, status and logs of real jobs, and the report of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nemotron.cli.app import main

Captured = pytest.CaptureFixture[str]


def test_list_status_and_logs_of_two_jobs(demo: Path, capsys: Captured) -> None:
    assert main(["jobs", "list"]) == 0
    assert capsys.readouterr().out == "No jobs here.\n"
    main(["steps", "run", "demo/make"])
    main(["steps", "run", "demo/make", "behaviour=refuse"])
    capsys.readouterr()
    assert main(["jobs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["JOB", "STATUS", "EXIT", "STARTED", "PROFILE", "SCHEDULER", "ID"]
    assert sorted(line.split()[1:3] for line in lines[1:]) == [["failed", "4"], ["succeeded", "0"]]
    assert main(["jobs", "list", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    failed = next(record["id"] for record in records if record["status"] == "failed")
    assert main(["jobs", "status", failed[-6:]]) == 0
    text = capsys.readouterr().out
    assert f"job        {failed}" in text
    assert "[too_odd] that is odd" in text
    assert "\nfix        make it even" in text
    assert main(["jobs", "logs", failed]) == 0
    assert capsys.readouterr().out.startswith("making\n")
    assert main(["jobs", "logs", failed, "--tail", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    (demo / ".nemotron" / "jobs" / failed / "job.json").write_text("{")
    assert main(["jobs", "list"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [line for line in lines if failed not in line]
    assert f"note: {failed}: " in err


def test_status_shows_what_was_known_where_the_scheduler_does_not_answer(
    demo: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["steps", "run", "demo/make"])
    (path,) = (Path(".nemotron") / "jobs").glob("*/job.json")
    placement = {"executor": "slurm", "id": "2", "name": "make", "directory": "/nowhere"}
    changes = {"status": "running", "exit_code": None, "placement": placement}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setenv("PATH", "/nowhere")
    capsys.readouterr()
    assert main(["jobs", "status", "2"]) == 0  # which every id has in it
    out, err = capsys.readouterr()
    assert "status     running" in out
    assert "note: this is the last known state; scontrol is not installed on this host" in err


def test_report_writes_a_page_and_with_json_prints_the_figures(
    here: Path, capsys: Captured
) -> None:
    for name in ("one", "two"):
        (here / name).mkdir()
        event = {"event": "validation", "iteration": 3, "time": 1.0, "lm_loss": 2.5}
        (here / name / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    assert main(["jobs", "report", "one"]) == 0
    assert capsys.readouterr().out == "report-one.html\n"
    assert main(["jobs", "report", "one", "--against", "two", "-o", "page.html"]) == 0
    assert "one against two" in (here / "page.html").read_text()
    assert main(["jobs", "report", "one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.removeprefix("page.html\n"))["run"][
        "best_valid_loss"
    ] == pytest.approx(2.5)
    assert sorted(path.name for path in here.glob("*.html")) == ["page.html", "report-one.html"]
    assert main(["jobs", "report", "three", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "job_unknown"


def test_a_detached_local_job_is_cancelled_and_waited_for(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "-b", "local", "behaviour=sleep"]) == 0
    job_id = capsys.readouterr().out.strip()
    log = Path(".nemotron") / "jobs" / job_id / "log.txt"
    end = time.monotonic() + 30
    while "making" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert main(["jobs", "cancel", job_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "cancelled"
    assert main(["jobs", "wait", job_id]) == 130
    assert main(["jobs", "logs", "-f", job_id]) == 130


def test_wait_says_when_nothing_will_ever_say_how_a_job_ended(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make"]) == 0
    (path,) = (Path(".nemotron") / "jobs").glob("*/job.json")
    record = json.loads(path.read_text())
    record |= {"status": "running", "exit_code": None, "pid": 2**22 - 1}
    path.write_text(json.dumps(record))
    assert main(["jobs", "wait", record["id"]]) == 8
    assert "error[job_lost]" in capsys.readouterr().err
