"""nemotron.jobs: the record that a run leaves."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nemotron
from nemotron import jobs
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import Job


def create(step: str = "demo/make", **changes: object) -> Job:
    facts: dict[str, object] = {
        "step": step,
        "profile": None,
        "argv": ["nemotron", "steps", "run", step],
        "command": ["python", "-m", "x"],
        "values": {"a": 1},
        "config_text": "a: 1\n",
    }
    return jobs.create(jobs.new_directory(step), **{**facts, **changes})  # type: ignore[arg-type]


def test_a_job_is_recorded_whole(here: Path) -> None:
    job = create()
    record = json.loads((job.path / "job.json").read_text())
    assert record["id"] == job.path.name
    assert record["status"] == "queued"
    assert record["versions"]["nemotron"] == nemotron.__version__
    assert record["versions"]["torch"]
    assert record["directory"] == str(here)
    assert record["pid"] == os.getpid()
    assert (job.path / "train.yaml").read_text() == "a: 1\n"
    assert job.log.read_text() == ""


def test_the_id_tells_time_and_step(here: Path) -> None:
    name = jobs.new_directory("peft/megatron_bridge").name
    date, time, *step, random = name.split("-")
    assert (len(date), len(time), len(random)) == (8, 6, 6)
    assert step == ["peft", "megatron", "bridge"]


def test_two_jobs_of_the_same_second_do_not_collide(here: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(jobs.new_directory, ["demo/make"] * 64))
    assert len(set(paths)) == 64


def test_only_the_owner_can_read_a_job(here: Path) -> None:
    job = create()
    assert stat.S_IMODE(job.path.stat().st_mode) == 0o700
    for path in job.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_secrets_are_in_no_file_of_the_record(here: Path) -> None:
    job = create(
        argv=["nemotron", "--", "--hf-token", "hunter2hunter2"],
        command=["python", "--api-key=tiger", "x=hunter2hunter2"],
        values={"tokenizer": "bpe", "note": "hunter2hunter2", "api_key": "tiger"},
        known_secrets=frozenset({"hunter2hunter2"}),
    )
    job.end(1, {"problem": "cannot log in with hunter2hunter2"})
    text = (job.path / "job.json").read_text()
    assert "hunter2" not in text
    assert "tiger" not in text
    assert job.record.config["tokenizer"] == "bpe"


def test_the_commit_of_the_code_is_recorded_only_for_a_checkout(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemotron, "__file__", str(tmp_path / "__init__.py"))
    assert create().record.git is None


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, "succeeded"), (1, "failed"), (4, "failed"), (75, "preempted"), (130, "interrupted")],
)
def test_the_end_is_recorded_with_its_exit_code(here: Path, code: int, status: str) -> None:
    job = create()
    job.start()
    assert jobs.read_job(job.path).record.status == "running"
    job.end(code, {"code": "x"} if code else None)
    record = jobs.read_job(job.path).record
    assert (record.status, record.exit_code) == (status, code)
    assert record.started is not None
    assert record.ended is not None


def test_a_job_whose_launcher_is_gone_is_lost(here: Path) -> None:
    job = create()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    job.update(status="running", pid=pid)
    assert jobs.read_job(job.path).record.status == "lost"
    job.update(host="elsewhere")
    assert jobs.read_job(job.path).record.status == "running"


def test_list_jobs_is_sorted_and_skips_what_is_no_job(here: Path) -> None:
    assert jobs.list_jobs() == []
    first, second = create("demo/a"), create("demo/b")
    (here / ".nemotron" / "jobs" / "notes").mkdir()
    assert {job.record.id for job in jobs.list_jobs()} == {first.record.id, second.record.id}


def test_find_takes_an_id_or_a_part_that_only_one_has(here: Path) -> None:
    first, second = create("demo/a"), create("demo/b")
    assert jobs.find(first.record.id).record.id == first.record.id
    assert jobs.find("demo-b").record.id == second.record.id
    with pytest.raises(NemotronError, match="matches 2 jobs"):
        jobs.find("demo")
    with pytest.raises(NemotronError, match="no job 'zzz'") as caught:
        jobs.find("zzz")
    assert caught.value.code == "job_unknown"


def test_a_record_of_a_later_version_is_named_and_not_called_damaged(here: Path) -> None:
    job = create()
    path = job.path / jobs.RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(NemotronError, match=r"is from another version of nemotron: it has colour"):
        jobs.read_job(job.path)


def test_a_damaged_record_is_named(here: Path) -> None:
    job = create()
    (job.path / "job.json").write_text("{")
    with pytest.raises(NemotronError, match="cannot be read") as caught:
        jobs.find(job.record.id)
    assert caught.value.exit_code is ExitCode.IO


HAMMER = """
import sys
from pathlib import Path
from nemotron import jobs
job = jobs.read_job(Path(sys.argv[1]))
for number in range(100):
    job.update(**{sys.argv[2]: str(number)})
"""


def test_writers_of_one_record_lose_nothing_of_each_other(here: Path) -> None:
    job = create()
    fields = ("reason", "started", "log", "directory")
    writers = [
        subprocess.Popen([sys.executable, "-c", HAMMER, str(job.path), field]) for field in fields
    ]
    while any(writer.poll() is None for writer in writers):
        jobs.read_job(job.path)  # always whole
    assert [writer.returncode for writer in writers] == [0] * len(writers)
    record = json.loads((job.path / "job.json").read_text())
    assert [record[field] for field in fields] == ["99"] * len(fields)
    assert not list(job.path.glob("*.partial"))


def test_an_end_that_is_recorded_stays(here: Path) -> None:
    job = create()
    stale = jobs.read_job(job.path)
    job.end(4, {"code": "too_odd"})
    stale.end(0)
    assert stale.record == jobs.read_job(job.path).record
    assert (stale.record.status, stale.record.exit_code) == ("failed", 4)


def test_a_record_that_cannot_be_written_leaves_the_one_that_is_there(here: Path) -> None:
    job = create()
    before = (job.path / "job.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            job.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (job.path / "job.json").read_bytes() == before
    assert not list(job.path.glob("*.partial"))
    assert job.record.status == "running"  # to be shown, at least


def test_an_error_that_comes_from_elsewhere_is_written_without_secrets(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.read_job(create().path)  # as in another terminal
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    job.end(1, {"problem": "cannot log in with hunter2hunter2"})
    assert "hunter2" not in (job.path / "job.json").read_text()


def test_a_name_that_fits_many_jobs_is_told_with_the_newest_few(here: Path) -> None:
    ids = sorted(create().record.id for _ in range(12))
    with pytest.raises(NemotronError, match="matches 12 jobs") as caught:
        jobs.find("demo")
    assert caught.value.fix == f"the newest are: {', '.join(ids[:-6:-1])}"


def test_an_empty_name_fits_no_job(here: Path) -> None:
    create()
    with pytest.raises(NemotronError) as caught:
        jobs.find("")
    assert caught.value.code == "job_unknown"
