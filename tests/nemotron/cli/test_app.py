"""The command line as a whole: what is accepted, what is refused, and what a refusal looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import nemotron
from nemotron.cli.app import app, main


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        # Options of the root and of a group are refused, not ignored.
        (["-d", "steps", "run", "demo/make"], "unknown_option", "nemotron has no option -d"),
        (["--run", "p", "steps", "run", "demo/make"], "unknown_option", "steps run STEP"),
        (["steps", "-c", "tiny", "run", "demo/make"], "unknown_option", "nemotron steps has no"),
        # -r and -b exclude each other.
        (["steps", "run", "demo/make", "-r", "x", "-b", "y"], "options_exclude", "-r x and -b y"),
        # A cluster of short options is no profile.
        (["steps", "run", "demo/make", "-lr=0.1"], "unknown_option", "no option -l"),
        (["steps", "run", "demo/make", "-lr", "child"], "unknown_option", "no option -l"),
        (["steps", "run", "demo/make", "--dryrun"], "unknown_option", "did you mean --dry-run"),
        (["steps", "run", "demo/make", "--tp", "4"], "unknown_option", "no option --tp"),
        (["steps", "run", "demo/make", "--tp=8"], "unknown_option", "go after --"),
        (["steps", "run", "demo/make", "word"], "argument_invalid", "'word' is not key=value"),
        (["steps", "run", "tp=3", "demo/make"], "step_unknown", "no step 'tp=3'"),
        (["steps", "run", "demo/make", "-r"], "usage", "requires an argument"),
        (["steps", "run"], "usage", "Missing argument 'STEP'"),
        (["steps", "lst"], "usage", "No such command 'lst'"),
        (["steps", "run", "demo/make", "-r", "nope"], "profile_unknown", "no profile 'nope'"),
        (["steps", "run", "demo/make", "-c", "nope"], "config_unknown", "it has: default"),
        (["steps", "run", "demo/make", "-c", "a/b.yaml"], "config_missing", "no file a/b.yaml"),
        (["steps", "run", "use"], "step_ambiguous", "demo/use or other/use"),
        (["steps", "run", "demo/make", "behavior=ok"], "unknown_key", "did you mean behaviour?"),
        (["steps", "run", "demo/make", "behaviour=[1"], "invalid_value", "wanted 'ok'"),
        (["steps", "list", "--category", "x"], "filter_unknown", "no category 'x'"),
        (["jobs", "status", "x"], "job_unknown", "no job 'x'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_few_lines_with_exit_code_2(
    demo: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: str, text: str
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error[{code}]: ")
    assert text in err
    assert "  fix: " in err
    assert "Traceback" not in err
    assert not (demo / ".nemotron").exists()


def test_an_error_is_json_when_json_is_wanted(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steps", "run", "demo/make", "--json", "a.b=1", "c=2"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "unknown_key"
    assert [inner["problem"] for inner in error["errors"]] == ["unknown key a", "unknown key c"]
    assert main(["steps", "list", "--json", "--nope"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown_option"


def test_json_and_debug_after_the_dashes_are_not_ours(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steps", "run", "demo/make", "a=1", "--", "--json", "--debug"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


def test_debug_shows_the_traceback(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "run", "demo/make", "a=1", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error[unknown_key]" in err


def test_a_defect_of_ours_is_one_error_too(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("nemotron.catalog.find_step", fail)
    assert main(["steps", "show", "x"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[unexpected]: RuntimeError: boom")
    assert "Traceback" not in err


def test_a_place_that_cannot_be_written_is_no_defect(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "profiles").touch()
    assert main(["profiles", "init", "slurm"]) == 6
    err = capsys.readouterr().err
    assert err.startswith("error[input_output_failed]: File exists\n  where: profiles\n  fix: ")


def test_an_argument_that_is_not_utf_8_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", "run", "data_prep/sft_packing", "output_dir=a\udcff"]) == 2
    assert "'output_dir=a\\udcff' is not UTF-8" in capsys.readouterr().err


def test_help_and_version_answer_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{nemotron.__version__}\n"
    for argv in (["--help"], ["-h"], ["steps", "-h"], ["steps", "run", "--help"]):
        assert main(argv) == 0
        assert "Usage: nemotron" in capsys.readouterr().out


def test_no_command_shows_the_help_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def options(command: Any, path: str = "nemotron") -> dict[str, set[str]]:
    own = {option for parameter in command.params for option in parameter.opts if "-" in option}
    found = {path: own}
    for name, child in getattr(command, "commands", {}).items():
        found |= options(child, f"{path} {name}")
    return found


def test_commands_and_options_are_the_documented_ones() -> None:
    """A new option changes this list on purpose."""
    both = {"--json", "--debug"}
    filters = {"--category", "--consumes", "--produces", "--tag", "--tree"}
    run = {"-c", "--config", "-r", "--run", "-b", "--batch", "-d", "--dry-run", "--force-squash"}
    run |= {"--on-interrupt"}
    assert options(typer.main.get_command(app)) == {
        "nemotron": {"--version"},
        "nemotron adapter": set(),
        "nemotron doctor": both,
        "nemotron adapter verify": both | {"--base"},
        "nemotron adapter diff": both | {"--base"},
        "nemotron adapter export": both | {"--base", "--to"},
        "nemotron steps": set(),
        "nemotron steps list": both | filters,
        "nemotron steps show": both,
        "nemotron steps run": both | run,
        "nemotron jobs": set(),
        "nemotron jobs list": both,
        "nemotron jobs status": both,
        "nemotron jobs logs": {"--tail", "-f", "--follow", "--on-interrupt", "--debug"},
        "nemotron jobs cancel": both,
        "nemotron jobs wait": both,
        "nemotron jobs report": both | {"--against", "-o", "--output"},
        "nemotron data": set(),
        "nemotron data stats": both | {"--png"},
        "nemotron data inspect": both | {"--row", "--split", "--tokenizer"},
        "nemotron profiles": set(),
        "nemotron profiles list": both,
        "nemotron profiles show": both,
        "nemotron profiles init": {"--debug"},
        "nemotron profiles check": both,
    }


def test_help_imports_neither_torch_nor_nemo_run() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "nemotron", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nemotron.cli.app" in modules
    heavy = {"torch", "nemo_run", "numpy", "pyarrow", "transformers", "tokenizers", "matplotlib"}
    assert not modules & heavy


def test_steps_list_takes_less_than_700_ms_of_cpu() -> None:
    script = (
        "import contextlib, io, time\n"
        "from nemotron.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert main(['steps', 'list']) == 0\n"
        "print(time.process_time())\n"
    )
    # CPU time of the whole process, the interpreter's start included; the best of three, because
    # other work on the machine costs caches.
    seconds = [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(3)]
    assert min(seconds) < 0.7


def test_a_reader_that_leaves_early_is_no_error() -> None:
    # Python's buffer takes the one, and not the other.
    for command in ("steps list", "steps show peft/megatron_bridge"):
        script = f"set -o pipefail; {sys.executable} -m nemotron {command} | true"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_cost_what_they_would_show(here: Path, closed: str) -> None:
    words = "steps run data_prep/sft_packing -c tiny output_dir=out"
    script = f"{sys.executable} -m nemotron {words} {closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = Path(".nemotron", "jobs").glob("*/job.json")
    assert json.loads(path.read_text())["status"] == "succeeded"
    assert "rows read" in (path.parent / "log.txt").read_text()
    assert ("rows read" in done.stdout) == (">&-" not in closed.split())
    failed = f"{sys.executable} -m nemotron steps show nope {closed}"
    assert subprocess.run(["bash", "-c", failed], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_has_no_room_is_named_where_it_can_be_read(more: list[str]) -> None:
    argv = [sys.executable, "-m", "nemotron", "steps", "list", *more]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[:2]) == (
        6,
        ["error[input_output_failed]: No space left on device", "  where: standard output"],
    )
    assert len(lines) == 3


def test_a_working_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    script = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m nemotron profiles list"
    argv = ["bash", "-c", script]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith(
        "error[input_output_failed]: No such file or directory\n  where: the working directory\n"
    )


def test_an_interrupt_while_python_still_imports_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [sys.executable, "-m", "nemotron", "steps", "list"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
