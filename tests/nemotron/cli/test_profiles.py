"""nemotron profiles: list, show, init, check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron.cli.app import main

Captured = pytest.CaptureFixture[str]


def test_list_names_executor_parent_and_file(here: Path, capsys: Captured) -> None:
    (here / "env.toml").write_text('[base]\nexecutor = "slurm"\n[top]\nextends = "base"\n')
    assert main(["profiles", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["top"] == {
        "name": "top",
        "executor": "slurm",
        "extends": "base",
        "file": "env.toml",
    }
    assert rows["local"]["file"] == "built in"
    assert main(["profiles", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        *("NAME", "EXECUTOR", "EXTENDS", "FILE"),
    ]


def test_show_gives_the_values_that_a_run_would_use_and_where_they_are(
    here: Path, capsys: Captured
) -> None:
    (here / "env.toml").write_text(
        '[base]\nexecutor = "slurm"\nnodes = 2\n[top]\nextends = "base"\nqos = "high"\n'
    )
    assert main(["profiles", "show", "top"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "top (slurm)",
        "  nodes: 2  # env.toml [base]",
        "  qos: high  # env.toml [top]",
    ]
    assert main(["profiles", "show", "top", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == {"nodes": 2, "qos": "high"}


@pytest.mark.parametrize("executor", ["local", "slurm", "lepton"])
def test_init_writes_profiles_that_load_and_never_over_others(
    here: Path, capsys: Captured, executor: str
) -> None:
    assert main(["profiles", "init", executor]) == 0
    assert main(["profiles", "show", executor]) == 0
    assert main(["profiles", "init", executor]) == 2
    assert f"rm profiles/{executor}.toml" in capsys.readouterr().err


def test_check_says_all_that_is_wrong(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "env.toml").write_text('[p]\nsecrets = ["HF_TOKEN", "OTHER_TOKEN"]\n')
    assert main(["profiles", "check", "p"]) == 3
    captured = capsys.readouterr()
    assert "ok       p is a valid local profile" in captured.out
    assert "secret HF_TOKEN is not set here" in captured.err
    assert "secret OTHER_TOKEN is not set here" in captured.err
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    monkeypatch.setenv("OTHER_TOKEN", "hunter2hunter2")
    assert main(["profiles", "check", "p"]) == 0


def test_check_takes_a_number_for_text_as_a_run_does(here: Path, capsys: Captured) -> None:
    (here / "env.toml").write_text("[p]\nenv_vars = { N = 1 }\n")
    assert main(["profiles", "check", "p"]) == 0
    assert "p is a valid local profile" in capsys.readouterr().out


def test_check_does_not_advise_ssh_where_there_is_no_ssh(
    here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["[p]", "executor='slurm'", "tunnel='ssh'", "host='login'", "remote_job_dir='/jobs'"]
    (here / "env.toml").write_text("\n".join(lines))
    monkeypatch.setenv("PATH", str(here))
    assert main(["profiles", "check", "p"]) == 9
    assert "ssh is not installed on this host\n  fix: install it" in capsys.readouterr().err
