"""nemotron.launch.script: whatever text a plan holds, the job gets it as it is."""

from __future__ import annotations

import base64
import dataclasses
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.executors import LeptonExecution
from nemotron.launch import script
from nemotron.launch.archive import pack_code
from tests.nemotron.launch.conftest import plan_of
from tests.nemotron.launch.nasty import check_shell, values

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{3,20}", fullmatch=True).filter(
    lambda name: not name.startswith(("BASH", "LC_", "PATH", "TMPDIR", "SHELLOPTS"))
)
# Writes the words and the environment that it gets, each ended by NUL.
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 9
printf '%s\\0' "$@" > "$RIG_OUT/argv"
env -0 > "$RIG_OUT/environment"
pwd > "$RIG_OUT/directory"
"""


@pytest.mark.parametrize("executor", ["slurm", "lepton"])
@check_shell
@given(
    words=st.lists(values, max_size=4),
    environment=st.dictionaries(names, values, max_size=4),
    folder=values.filter(lambda text: len(text.encode()) < 200 and text not in ("", ".", "..")),
)
def test_the_job_gets_words_environment_and_directory_as_they_are(
    demo: Path, executor: str, words: list[str], environment: dict[str, str], folder: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name).resolve()
        workspace = here / "w" / folder.replace("/", "|")
        plan = dataclasses.replace(
            plan_of(executor, demo),
            arguments=(
                "python",
                "-m",
                "module",
                *words,
                "--config",
                ".nemotron/jobs/<job>/train.yaml",
            ),
            environment=environment,
            workspace=workspace,
        )
        commands = {"code_path": "/there is nothing"}
        plan = dataclasses.replace(plan, execution=plan.execution.model_copy(update=commands))
        text = script.launch_script(plan, job_id="job-1", archive=None)
        (here / "bin").mkdir()
        (here / "bin" / "python").write_text(PYTHON)
        (here / "bin" / "python").chmod(0o755)
        (here / "launch.sh").write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["bash", str(here / "launch.sh")],
            env={"PATH": f"{here}/bin:/usr/bin:/bin", "RIG_OUT": name},
            cwd=here,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        given_words = (here / "argv").read_bytes().split(b"\0")[:-1]
        expected = ["-m", "module", *words, "--config", str(here / "train.yaml")]
        assert [os.fsdecode(word) for word in given_words] == expected
        pairs = (pair.split(b"=", 1) for pair in (here / "environment").read_bytes().split(b"\0"))
        found = {os.fsdecode(pair[0]): os.fsdecode(pair[1]) for pair in pairs if len(pair) == 2}
        assert {name: found.get(name) for name in environment} == environment
        assert (here / "directory").read_bytes() == os.fsencode(f"{workspace}\n")
        assert not list(here.rglob("canary"))


def test_the_chunks_of_the_code_come_together_again(demo: Path, tmp_path: Path) -> None:
    archive = pack_code(left_out=("steps",))
    text = base64.b64encode(archive.content).decode()
    middle = len(text) // 2
    plan = plan_of("lepton", demo)
    assert isinstance(plan.execution, LeptonExecution)
    run = dataclasses.replace(plan, arguments=("cat", "nemotron/errors.py"), workspace=tmp_path)
    commands = {
        "startup_commands": ('cd "$nemotron_package"', "env | grep -c NEMOTRON_CODE || true")
    }
    run = dataclasses.replace(run, execution=plan.execution.model_copy(update=commands))
    (tmp_path / "launch.sh").write_text(
        script.launch_script(run, job_id="job-1", archive=archive.name, chunks=2)
    )
    done = subprocess.run(
        ["bash", str(tmp_path / "launch.sh")],
        env={
            "PATH": "/usr/bin:/bin",
            "NEMOTRON_CODE_0": text[:middle],
            "NEMOTRON_CODE_1": text[middle:],
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0\n")  # the chunks are not handed on
    assert "class NemotronError" in done.stdout
    assert not list(Path("/tmp").glob("nemotron-job-1*"))  # noqa: S108 - where the script puts it


def test_a_run_command_wraps_the_command_or_names_script_and_config(demo: Path) -> None:
    def line(template: str, *words: str) -> str:
        commands = {"run_command": template, "code_path": "/code"}
        plan = plan_of("slurm", demo)
        plan = dataclasses.replace(plan, arguments=(*plan.arguments, *words))
        plan = dataclasses.replace(plan, execution=plan.execution.model_copy(update=commands))
        lines = script.launch_script(plan, job_id="job-1", archive=None).splitlines()
        return lines[lines.index("trap : INT") + 1]

    start = 'python -m nemotron.steps.demo.make.step --config "$nemotron_here"/train.yaml'
    assert line("nsys profile {command}") == f"nsys profile {start}"
    assert line("{command}", "{config}", "{script}") == f"{start} '{{config}}' '{{script}}'"
    step = '"$nemotron_package"/nemotron/steps/demo/make/step.py'
    assert (
        line("python {script} --config {config}")
        == f'python {step} --config "$nemotron_here"/train.yaml'
    )


@pytest.mark.parametrize(
    ("python", "code", "is_stopped"),
    [
        ('kill -TERM "$PPID" $$', 0, True),  # told, and killed before it could listen
        ('kill -USR1 "$PPID"; exit 75', 0, True),
        ("kill -TERM $$", 143, False),
        ('kill -TERM "$PPID"; kill -KILL $$', 137, False),
        ('kill -TERM "$PPID"; exit 4', 4, False),
    ],
)
def test_a_job_that_was_told_to_stop_can_go_on(
    demo: Path, tmp_path: Path, python: str, code: int, is_stopped: bool
) -> None:
    done = run_launch(demo, tmp_path, python)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "stopped.0").exists() == is_stopped


def test_a_variable_of_the_job_takes_no_place_of_one_of_the_script(
    demo: Path, tmp_path: Path
) -> None:
    names = ("here", "node", "restart", "package", "told", "code", "cores")
    python = 'env > "$RIG_OUT/environment"; printf "%s\\n" "$@" > "$RIG_OUT/words"; exit 75'
    done = run_launch(
        demo, tmp_path, python, {name: "/elsewhere" for name in names}, RIG_OUT=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "stopped.0").exists()
    assert f"{tmp_path}/train.yaml" in (tmp_path / "words").read_text().splitlines()
    variables = (tmp_path / "environment").read_text().splitlines()
    assert {f"{name}=/elsewhere" for name in names} <= set(variables)
    assert f"NEMOTRON_ERROR_FILE={tmp_path}/error.0.json" in variables
    assert "PYTHONPATH=/nowhere" in variables


@pytest.mark.parametrize("given", [None, "7"])
def test_a_rank_has_its_share_of_the_cores_unless_somebody_says_otherwise(
    demo: Path, tmp_path: Path, given: str | None
) -> None:
    environment = {} if given is None else {"OMP_NUM_THREADS": given}
    done = run_launch(demo, tmp_path, 'echo "$OMP_NUM_THREADS"', **environment)
    cores = str(len(os.sched_getaffinity(0)))
    assert done.stdout == f"{given or cores}\n"


def run_launch(
    demo: Path,
    directory: Path,
    python: str,
    variables: dict[str, str] | None = None,
    /,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script of a Slurm job whose python is these lines of shell."""
    plan = plan_of("slurm", demo)
    execution = plan.execution.model_copy(update={"code_path": "/nowhere"})
    plan = dataclasses.replace(
        plan, execution=execution, workspace=directory, environment=variables or {}
    )
    text = script.launch_script(plan, job_id="job-1", archive=None)
    (directory / "launch.sh").write_text(text)
    (directory / "python").write_text(f"#!/bin/sh\n{python}\n")
    (directory / "python").chmod(0o755)
    return subprocess.run(
        ["bash", str(directory / "launch.sh")],
        env={"PATH": f"{directory}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_that_fails_without_a_word_is_asked_for_its_packages(
    demo: Path, tmp_path: Path
) -> None:
    python = 'if [ "$2" = nemotron.packages ]; then echo asked; exit 3; fi'
    assert run_launch(demo, tmp_path, f"{python}; exit 1").returncode == 3
    assert run_launch(demo, tmp_path, f"{python}; exit 0").stdout == ""
    assert run_launch(demo, tmp_path, f"{python}; exit 4").returncode == 4
    said = run_launch(demo, tmp_path, f'{python}; echo {{}} > "$NEMOTRON_ERROR_FILE"; exit 1')
    assert (said.returncode, said.stdout) == (1, "")
