"""How a step starts and ends: exit codes, the error file, errors of the manifest."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.artifacts import Producer
from nemotron.config import Schema
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._entry import run_step, step_error


class Config(Schema):
    value: int = 0


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "train.yaml").write_text("value: 3\n", encoding="utf-8")
    return ["--config", str(tmp_path / "train.yaml")]


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMOTRON_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def fail(config: Config, produced_by: Producer) -> None:
    raise NemotronError("broken", "it broke", fix="mend it", exit_code=ExitCode.DATA)


def test_a_step_gets_its_config_and_what_to_write_as_producer(arguments: list[str]) -> None:
    seen: list[tuple[int, str]] = []
    code = run_step("a/b", Config, lambda c, p: seen.append((c.value, p.step)), arguments)
    assert (code, seen) == (0, [(3, "a/b")])


def test_an_error_is_printed_with_its_fix_and_becomes_the_exit_code(
    arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_step("a/b", Config, fail, arguments) == ExitCode.DATA
    assert capsys.readouterr().err == "error[broken]: it broke\n  fix: mend it\n"
    assert json.loads(error_file.read_text())["code"] == "broken"


def test_only_the_first_rank_to_fail_speaks(
    arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert run_step("a/b", Config, fail, arguments) == ExitCode.DATA
    assert capsys.readouterr().err.count("error[broken]") == 1


def test_an_argument_that_the_step_does_not_know_is_one_error(
    arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_step("a/b", Config, fail, [*arguments, "--tp", "4"])
    assert code == ExitCode.USAGE
    assert "error[argument_unknown]: a/b takes no arguments; got 2" in capsys.readouterr().err


def test_what_nobody_foresaw_keeps_its_traceback(
    arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def divide(config: Config, produced_by: Producer) -> None:
        raise ZeroDivisionError("by zero")

    assert run_step("a/b", Config, divide, arguments) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error[unexpected]: ZeroDivisionError: by zero" in err
    assert f"{os.path.basename(__file__)}:" in err  # noqa: PTH119 - a name, not a path


def test_an_error_of_the_manifest_has_its_cause_recovery_and_exit_code() -> None:
    error = step_error("peft/megatron_bridge", "missing_packed_data", "nothing there", where="x")
    assert error.exit_code == ExitCode.PREFLIGHT
    assert error.fix.startswith("run data_prep/sft_packing first")
    assert "dataset.nano3_packed_sft_dir" in error.why


def test_an_error_that_no_manifest_has_is_a_defect_of_the_step() -> None:
    with pytest.raises(KeyError, match="no_such_error"):
        step_error("peft/megatron_bridge", "no_such_error", "?")


@pytest.mark.parametrize(("raised", "shown"), [("KeyboardInterrupt", ""), ("ValueError", "Error")])
def test_a_job_that_is_interrupted_while_it_imports_says_nothing(raised: str, shown: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import nemotron.steps; raise {raised}"],
        env={**os.environ, "NEMOTRON_ERROR_FILE": "error.json"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.strip().endswith(shown)
    assert bool(done.stderr) == bool(shown)


def test_a_place_that_cannot_be_written_is_no_defect(
    arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(config: Config, produced_by: Producer) -> None:
        (error_file.parent / "train.yaml" / "below a file").mkdir()

    assert run_step("a/b", Config, write, arguments) == ExitCode.IO
    err = capsys.readouterr().err
    assert err.startswith("error[input_output_failed]: Not a directory\n  where: ")
    assert "below a file\n  fix: " in err
    assert json.loads(error_file.read_text())["exit_code"] == ExitCode.IO


def test_an_error_of_the_system_without_a_path_tells_where_it_came_and_what_was_noted(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def write(config: Config, produced_by: Producer) -> None:
        error = OSError(errno.ENOSPC, "No space left on device")
        error.add_note("after step 3")
        raise error

    assert run_step("a/b", Config, write, arguments) == ExitCode.IO
    err = capsys.readouterr().err
    assert err.startswith("error[input_output_failed]: No space left on device, after step 3\n")
    assert f"  where: {__file__}:" in err


def test_an_error_that_cannot_be_recorded_is_printed_and_keeps_its_exit_code(
    arguments: list[str],
    error_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NEMOTRON_ERROR_FILE", str(error_file.parent / "missing" / "error.json"))
    assert run_step("a/b", Config, fail, arguments) == ExitCode.DATA
    assert "error[broken]: it broke" in capsys.readouterr().err
