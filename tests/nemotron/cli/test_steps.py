"""``nemotron steps``: what is printed, and what is not done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemotron.cli.app import main

Captured = pytest.CaptureFixture[str]


def output(capsys: Captured, *argv: str) -> str:
    assert main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def data(capsys: Captured, *argv: str) -> Any:
    return json.loads(output(capsys, *argv, "--json"))


def test_list_is_a_table_a_tree_or_json(demo: Path, capsys: Captured) -> None:
    table = output(capsys, "steps", "list").splitlines()
    assert table[0].split() == ["STEP", "CONSUMES", "PRODUCES", "NAME"]
    assert [line.split()[0] for line in table[1:]] == [
        "demo/loop",
        "demo/make",
        "demo/train",
        "demo/use",
        "other/use",
    ]
    assert output(capsys, "steps", "list", "--tree").startswith("demo\n  loop")
    assert [step["id"] for step in data(capsys, "steps", "list", "--tree")][1] == "demo/make"


def test_list_filters_and_says_when_nothing_is_left(demo: Path, capsys: Captured) -> None:
    assert [step["id"] for step in data(capsys, "steps", "list", "--tag", "fast")] == ["demo/make"]
    found = data(capsys, "steps", "list", "--consumes", "raw_jsonl", "--produces", "packed_parquet")
    assert [step["id"] for step in found] == ["demo/make"]
    nothing = ("steps", "list", "--category", "other", "--tag", "fast")
    assert output(capsys, *nothing) == "No steps matched.\n"
    assert data(capsys, *nothing) == []


def test_show_prints_everything_that_the_manifest_says(demo: Path, capsys: Captured) -> None:
    text = output(capsys, "steps", "show", "demo/train")
    for part in (
        "default, tiny",
        "packed_parquet",
        "data.packs, data.glob",
        "checkpoint_lora",
        "peft.dim=4 (4, 8)",
        "missing_packs (exit 3)",
        "there are no packs. Fix: run demo/make",
        "registry.example/demo:25.10",
    ):
        assert part in text
    assert "When you test" in output(capsys, "steps", "show", "make")


def test_show_as_json_has_configs_errors_and_strategies(demo: Path, capsys: Captured) -> None:
    shown = data(capsys, "steps", "show", "demo/make")
    assert shown["configs"] == ["default", "broken", "silent", "tiny"]
    assert shown["strategies"] == [{"when": "you test", "then": "use it"}]
    assert shown["launch"] == "python"
    assert {"id", "name", "category", "description", "tags", "path"} <= set(shown)


def test_a_dry_run_writes_nothing_and_prints_the_plan(demo: Path, capsys: Captured) -> None:
    text = output(capsys, "steps", "run", "demo/train", "peft.dim=8", "-d")
    for part in (
        "demo/train -c default on this host: 2 rank(s) on 1 node(s)",
        "dim: 8  # argument peft.dim=8",
        "--nproc-per-node 2 -m nemotron.steps.demo.train.step --config",
        "OMP_NUM_THREADS",
        "packed_parquet: ./out/make  (data.packs)",
        "checkpoint_lora: out/train  (save)",
        "pending  packed_parquet at ./out/make: not there yet",
        "tokenizer: bpe",
    ):
        assert part in text
    assert sorted(path.name for path in demo.iterdir()) == ["pyproject.toml"]


def test_a_dry_run_shows_what_a_value_replaced(demo: Path, capsys: Captured) -> None:
    text = output(capsys, "steps", "run", "demo/train", "-c", "tiny", "peft.dim=8", "-d")
    assert "dim: 8  # argument peft.dim=8, over tiny.yaml:3" in text


def test_a_dry_run_as_json_is_the_same_as_data(demo: Path, capsys: Captured) -> None:
    plan = data(capsys, "steps", "run", "demo/train", "-c", "tiny", "-d", "peft.dim=8")
    assert plan["config"]["peft"]["dim"] == 8
    assert plan["overridden"]["peft.dim"] == "argument peft.dim=8, over tiny.yaml:3"
    assert plan["command"][-1] == ".nemotron/jobs/<job>/train.yaml"
    assert plan["ranks"] == 2
    assert plan["environment"] == ["OMP_NUM_THREADS"]
    assert [check["status"] for check in plan["checks"]].count("pending") == 1


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_a_number_that_json_has_not_is_the_text_that_a_config_takes(
    demo: Path, capsys: Captured, number: str
) -> None:
    assert main(["steps", "run", "demo/train", "-d", "--json", f"peft.dropout={number}"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    plan = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert plan["config"]["peft"]["dropout"] == number


def test_a_dry_run_fails_when_a_check_fails(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/train", "-d", "peft.dim=13", "save=out/make"]) == 3
    out, err = capsys.readouterr()
    assert "FAILED   dim is 13" in out
    assert err.count("error[") == 2
    assert main(["steps", "run", "demo/train", "-d", "peft.dim=13", "--json"]) == 3
    failed = [c for c in json.loads(capsys.readouterr().out)["checks"] if c["status"] == "failed"]
    assert failed[0]["error"]["code"] == "unlucky"


def test_the_printed_config_is_yaml_that_loads(demo: Path, capsys: Captured) -> None:
    text = output(capsys, "steps", "run", "demo/train", "-d", "run_name='a: b # c'")
    lines = text.partition("\n\nconfig (")[2].partition("\n\n")[0].splitlines()[1:]
    assert yaml.safe_load("\n".join(lines))["run_name"] == "a: b # c"


def test_no_value_of_a_variable_or_secret_is_printed(
    demo: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    (demo / "env.toml").write_text('[p]\nsecrets = ["HF_TOKEN"]\nenv_vars = { COLOUR = "green" }\n')
    for extra in ([], ["--json"]):
        text = output(capsys, "steps", "run", "demo/make", "-d", "-r", "p", *extra)
        assert "HF_TOKEN" in text
        assert "COLOUR" in text
        assert "hunter2" not in text


@pytest.mark.parametrize("extra", [[], ["--json"], ["peft.dim=13"]])
def test_a_dry_run_with_a_secret_prints_nothing_of_it(
    demo: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "hunter2hunter2")
    assert main(["steps", "run", "demo/train", "-d", "run_name=hunter2hunter2", *extra]) == 2
    out, err = capsys.readouterr()
    assert "secret_in_job" in out + err
    assert "hunter2" not in out + err


def test_options_may_stand_anywhere_before_the_dashes(demo: Path, capsys: Captured) -> None:
    first = data(capsys, "steps", "run", "-d", "-c", "tiny", "demo/train", "peft.dim=8")
    last = data(capsys, "steps", "run", "demo/train", "peft.dim=8", "-c", "tiny", "--dry-run")
    assert first == last


def test_everything_after_the_dashes_is_verbatim(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "-d", "--json", "--", "--run", "child", "a.b=1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["command"][-3:] == ["--run", "child", "a.b=1"]
    assert plan["profile"] is None


def test_force_squash_says_that_it_has_no_effect(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "--force-squash"]) == 0
    assert "note: --force-squash has no effect" in capsys.readouterr().err


def test_a_real_run_ends_with_the_exit_code_of_the_job(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make"]) == 0
    out, err = capsys.readouterr()
    assert out == "making\n"
    assert err.startswith("running demo/make -c default (.nemotron/jobs/")
    assert main(["steps", "run", "demo/make", "behaviour=refuse"]) == 4
    assert capsys.readouterr().err.count("error[too_odd]") == 1


def test_a_real_run_as_json_prints_the_record_alone(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["status"] == "succeeded"
    assert record["argv"] == ["nemotron", "steps", "run", "demo/make", "--json"]
    assert "making" in err


def test_a_detached_run_prints_the_id_of_the_job(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "-b", "local"]) == 0
    job = capsys.readouterr().out.strip()
    assert (demo / ".nemotron" / "jobs" / job / "job.json").is_file()
    assert main(["jobs", "logs", "-f", job]) == 0
    assert "making" in capsys.readouterr().out
    assert main(["jobs", "status", job, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "succeeded"


def test_a_detached_run_as_json_has_the_process_that_runs_it(demo: Path, capsys: Captured) -> None:
    assert main(["steps", "run", "demo/make", "-b", "local", "behaviour=sleep", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["pid"] != os.getpid()
    assert main(["jobs", "status", record["id"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pid"] == record["pid"]
    assert main(["jobs", "cancel", record["id"]]) == 0


def test_a_slurm_run_where_there_is_no_slurm_ends_with_exit_code_9(
    demo: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (demo / "env.toml").write_text('[p]\nexecutor = "slurm"\n')
    monkeypatch.setenv("PATH", "/nowhere")
    for option in ("-r", "-b"):
        assert main(["steps", "run", "demo/train", option, "p"]) == 9
        error = capsys.readouterr().err
        assert "error[command_missing]: sbatch is not installed on this host" in error
        assert 'tunnel = "ssh"' in error
