"""nemotron.launch.slurm: the batch script, which is read by Slurm and by a shell."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nemotron.errors import NemotronError
from nemotron.executors import SlurmExecution
from nemotron.launch import slurm
from tests.nemotron.launch.conftest import plan_of
from tests.nemotron.launch.nasty import check_shell, values

CODE = ("setup_lines", "startup_commands", "run_command")  # shell by design
FIELDS = [
    name
    for name, field in SlurmExecution.model_fields.items()
    if "str" in str(field.annotation) and name not in (*CODE, "tunnel")
]


@check_shell
@given(field=st.sampled_from(FIELDS), value=values)
def test_a_slurm_field_is_refused_or_stays_on_its_line(demo: Path, field: str, value: str) -> None:
    plan = plan_of("slurm", demo)
    is_list = "tuple" in str(SlurmExecution.model_fields[field].annotation)
    is_table = "dict" in str(SlurmExecution.model_fields[field].annotation)
    written = [value] if is_list else {"extra_key": value} if is_table else value
    given_fields = {field: written, "container_image": "x", "code_path": "/code"} | {field: written}
    try:
        execution = SlurmExecution.model_validate(given_fields)
    except ValidationError:
        return
    plan = dataclasses.replace(plan, execution=execution)
    options = slurm.executor_options(plan, "true")
    for name, option in options.items():
        if name != "setup_lines" and isinstance(option, str):
            assert "\n" not in option
            assert "'" not in option
    for text in slurm.preview(plan).values():
        assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
        assert text.count("\n#SBATCH ") in (0, *range(6, 12))  # none is broken up or made up


SRUN = """#!/bin/sh
[ "$1" = --nodes=1 ] || printf '%s\\0' "$@" > "$RIG_OUT/srun"
"""


def test_srun_gets_mounts_image_and_arguments_as_they_are(demo: Path, tmp_path: Path) -> None:
    given_fields = {
        "container_image": "/images/$(touch${IFS}canary).sqsh",
        "mounts": ["/data/$(touch canary):/data", "/a b/`touch canary`:/c;d"],
        "srun_args": ["--comment=it's a; touch canary", "--mpi=$(touch canary)", "*", "a\nb"],
        "workspace": "/my data",
    }
    execution = SlurmExecution.model_validate(given_fields)
    mounts = (*execution.mounts, "/my data:/my data")
    plan = dataclasses.replace(
        plan_of("slurm", demo), execution=execution, image=execution.container_image, mounts=mounts
    )
    for program, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho n1\n")):
        (tmp_path / program).write_text(text)
        (tmp_path / program).chmod(0o755)
    subprocess.run(
        ["bash", "-c", slurm.preview(plan)["sbatch"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "RIG_OUT": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    words = (tmp_path / "srun").read_text().split("\0")
    assert words[words.index("--container-image") + 1] == given_fields["container_image"]
    given_mounts = words[words.index("--container-mounts") + 1].split(",")
    assert tuple(given_mounts[:-1]) == mounts  # the last one is nemo-run's
    given_arguments = words[words.index("--kill-on-bad-exit=1") + 1 : words.index("bash")]
    assert given_arguments == given_fields["srun_args"]
    assert not list(tmp_path.rglob("canary"))


def test_a_path_that_a_container_cannot_mount_is_refused(demo: Path) -> None:
    with pytest.raises(ValidationError, match="without quotes, backslashes and commas"):
        SlurmExecution.model_validate({"mounts": ["/a,/etc:/a"]})
    plan = plan_of("slurm", demo)
    with pytest.raises(NemotronError, match="cannot mount '/my, data'") as caught:
        slurm.executor_options(dataclasses.replace(plan, mounts=("/my, data:/my, data",)), "true")
    assert caught.value.code == "path_unsuitable"


def test_words_that_nemo_run_would_replace_are_refused_without_a_container(demo: Path) -> None:
    plan = plan_of("slurm", demo)
    fields = {"remote_job_dir": "/scratch/nemo_run", "code_path": "/code"}
    plan = dataclasses.replace(plan, execution=SlurmExecution.model_validate(fields))
    assert "--output=/scratch/nemo_run/experiments/" in slurm.preview(plan)["sbatch"]
    with pytest.raises(NemotronError, match="replaces /nemo_run with the job's directory"):
        slurm.preview(dataclasses.replace(plan, image=None))


def test_an_extra_directive_of_zero_is_one_and_one_of_false_is_none(demo: Path) -> None:
    extra = {"nice": 0, "hold": True, "reboot": False}
    execution = SlurmExecution.model_validate({"code_path": "/code", "extra": extra})
    batch = slurm.preview(dataclasses.replace(plan_of("slurm", demo), execution=execution))
    lines = [line for line in batch["sbatch"].splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nice=0", "#SBATCH --hold"} <= set(lines)
    assert not [line for line in lines if "reboot" in line]


@pytest.mark.parametrize("name", ["UID", "EUID", "PPID", "SHELLOPTS", "nemotron_here"])
def test_a_variable_that_no_shell_can_set_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="not read-only in bash"):
        SlurmExecution.model_validate({"env_vars": {name: "5"}})
    SlurmExecution.model_validate({"env_vars": {f"MY_{name}": "5"}})


@pytest.mark.parametrize("name", ["HUP", "INT", "USR1", "USR2", "TERM"])
def test_a_batch_shell_that_is_told_to_stop_leaves_the_code_of_srun(
    demo: Path, tmp_path: Path, name: str
) -> None:
    number = signal.Signals[f"SIG{name}"]
    assert run_batch(demo, tmp_path, number, srun="exit 0") == 0
    assert run_batch(demo, tmp_path, number, srun="exit 4") == 4
    assert run_batch(demo, tmp_path, number, setup_lines=f"{PAUSE}; true") == 128 + number


def test_a_job_whose_batch_shell_is_told_to_stop_is_not_queued_again(
    demo: Path, tmp_path: Path
) -> None:
    stop = 'touch "$RIG_OUT/stopped.0"'
    fields = {"requeue": True, "srun": stop}
    assert run_batch(demo, tmp_path, signal.SIGTERM, **fields) == 75
    assert not (tmp_path / "queued again").exists()
    assert run_batch(demo, tmp_path, None, **fields) is None
    assert (tmp_path / "queued again").exists()


def test_a_signal_for_the_batch_shell_alone_is_refused() -> None:
    for wanted in ("TERM@120", "R:USR1@60", "15"):
        assert SlurmExecution(signal=wanted).signal == wanted
    with pytest.raises(ValidationError, match="a B: in front"):
        SlurmExecution(signal="B:USR1@60")


PAUSE = 'touch "$RIG_OUT/running"; sleep 0.3'


def run_batch(
    demo: Path, directory: Path, number: int | None, *, srun: str = "exit 0", **fields: object
) -> int | None:
    """Run a batch script, with a signal in the middle; return the exit code that it left."""
    plan = plan_of("slurm", demo)
    execution = SlurmExecution.model_validate({"code_path": "/nowhere", **fields})
    batch = slurm.preview(dataclasses.replace(plan, execution=execution))["sbatch"]
    batch = batch.replace(str(slurm.job_directory(plan, "JOB") / "code"), str(directory))
    requeue = '#!/bin/sh\n[ "$1" != requeue ] || touch "$RIG_OUT/queued again"\n'
    first = '[ "$1" = --nodes=1 ] && exit'
    for name, text in (("srun", f"#!/bin/sh\n{first}\n{PAUSE}\n{srun}\n"), ("scontrol", requeue)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    for name in ("running", "exit.0"):
        (directory / name).unlink(missing_ok=True)
    with subprocess.Popen(
        ["bash", "-c", batch],
        env={"PATH": f"{directory}:/usr/bin:/bin", "RIG_OUT": str(directory)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (directory / "running").exists():
            assert process.poll() is None
            time.sleep(0.01)
        if number is not None:
            process.send_signal(number)
    left = directory / "exit.0"
    return int(left.read_text()) if left.exists() else None
