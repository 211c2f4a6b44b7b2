"""A real Slurm from outside: through ssh to a login node."""

from __future__ import annotations

import signal
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron.launch.host import Host

Nemotron = Callable[..., Any]
RUN = ("steps", "run", "demo/make")


def test_a_job_is_submitted_and_followed_over_ssh(over_ssh: Path, nemotron: Nemotron) -> None:
    done = nemotron(*RUN, "-r", "far", "behaviour=refuse")
    assert done.code == 4, done.err + done.out
    assert "making\n" in done.out
    assert (over_ssh / "far" / "workspace").is_dir()
    assert stat.S_IMODE((over_ssh / "far").stat().st_mode) == 0o700


def test_an_input_that_is_not_on_the_cluster_is_refused_before_anything_is_submitted(
    over_ssh: Path, nemotron: Nemotron
) -> None:
    train = ("steps", "run", "demo/train", "-c", "tiny", "-b", "far")
    plan = nemotron(*train, "--dry-run")
    assert "packed_parquet at ./out/make: checked on 127.0.0.1 when" in plan.out
    there = over_ssh / "far" / "workspace" / "out" / "make"
    there.mkdir(parents=True)  # empty
    refused = nemotron(*train)
    assert refused.code == 3, refused.err
    assert "error[missing_packs]: no packed_parquet at ./out/make" in refused.err
    assert "fix: make it first: nemotron steps run demo/make -c tiny -b far" in refused.err
    assert not (over_ssh / ".nemotron").exists()
    (there / "made 1.txt").touch()
    assert nemotron(*train, "data.packs=./out/nothing").code == 3
    # Found by the pattern, and then refused by Slurm, which spares the test a job.
    words = ("data.packs=null", "data.glob=./out/make/made*.txt", "run.env.partition=nowhere")
    found = nemotron(*train, *words)
    assert found.code == 9, found.err


def test_a_secret_reaches_a_job_and_stays_in_no_file_also_when_it_is_cancelled(
    over_ssh: Path,
    nemotron: Nemotron,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2 'hunter2'")
    python = (over_ssh / "env.toml").read_text().partition('["')[2].partition('"]')[0]
    show = f"run.env.startup_commands=['{python}', 'echo \\${{#HF_TOKEN}} characters']"
    words = ("run.env.secrets=[HF_TOKEN]", show, "behaviour=sleep")
    job_id = nemotron(*RUN, "-b", "far", *words).out.strip()
    until(lambda: "17 characters\nmaking" in nemotron("jobs", "logs", job_id).out)
    assert nemotron("jobs", "cancel", job_id).code == 0
    assert nemotron("jobs", "wait", job_id).code == 130
    assert "127.0.0.1" in nemotron("jobs", "status", job_id).out
    files = [path for path in over_ssh.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hunter2" in path.read_bytes()]
    assert not list((over_ssh / "far").glob(".environment*"))


def test_a_job_that_was_taken_is_recorded_also_if_its_secrets_stay_behind(
    over_ssh: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    run = Host.run

    def without_rm(host: Host, command: Sequence[str], **options: Any) -> Any:
        return run(host, ["false"] if command[0] == "rm" else command, **options)

    monkeypatch.setattr(Host, "run", without_rm)
    started = nemotron(*RUN, "-b", "far", "run.env.secrets=[HF_TOKEN]")
    assert started.code == 0, started.err
    (left,) = (over_ssh / "far").glob(".environment*")
    assert f"the file has secrets: remove {left} on 127.0.0.1 by hand" in started.err
    assert nemotron("jobs", "wait", started.out.strip()).code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_told_to_end_leaves_no_secrets(
    over_ssh: Path,
    launcher: Callable[..., subprocess.Popen[str]],
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    with launcher(*RUN, "-b", "far", "run.env.secrets=[HF_TOKEN]") as process:
        until(lambda: list((over_ssh / "far").glob(".environment*")), 60)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not list((over_ssh / "far").glob(".environment*"))


def test_a_host_whose_key_is_not_known_is_refused(
    over_ssh: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIG_KNOWN_HOSTS", "/dev/null")
    done = nemotron(*RUN, "-r", "far")
    assert done.code == 9
    assert "error[host_unreachable]" in done.err
    assert "Host key verification failed" in done.err
    assert "make this work without a prompt: ssh" in done.err
