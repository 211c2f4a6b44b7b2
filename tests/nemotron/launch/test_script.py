"""nemotron.launch.script: whatever text a plan holds, the job gets it as it is."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import signal
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nemotron.catalog import find_step
from nemotron.errors import NemotronError
from nemotron.executors import LeptonExecution, SlurmExecution
from nemotron.launch import lepton, script, slurm
from nemotron.launch.archive import pack_code
from nemotron.plan import JobPlan, build
from nemotron.profile import load_profile

# What an environment or an argument can hold: no NUL, and nothing that is no character.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
nasty = st.sampled_from(["$(touch canary)", "`touch canary`", "'; touch canary; '", "a\nb", "-n"])
values = texts | nasty
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
check_shell = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def plan_of(executor: str, demo: Path) -> JobPlan:
    (demo / "env.toml").write_text(
        f'[p]\nexecutor = "{executor}"\ncontainer_image = "x"\nstartup_commands = ["true"]\n'
    )
    return build(find_step("demo/make"), profile=load_profile("p"))


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
    with pytest.raises(NemotronError, match="puts the job's directory in place of /nemo_run"):
        slurm.preview(dataclasses.replace(plan, image=None))


def test_an_extra_directive_of_zero_is_one_and_one_of_false_is_none(demo: Path) -> None:
    extra = {"nice": 0, "hold": True, "reboot": False}
    execution = SlurmExecution.model_validate({"code_path": "/code", "extra": extra})
    batch = slurm.preview(dataclasses.replace(plan_of("slurm", demo), execution=execution))
    lines = [line for line in batch["sbatch"].splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nice=0", "#SBATCH --hold"} <= set(lines)
    assert not [line for line in lines if "reboot" in line]


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


@pytest.mark.parametrize("name", ["UID", "EUID", "PPID", "SHELLOPTS", "nemotron_here"])
def test_a_variable_that_no_shell_can_set_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="not one of bash's own"):
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
    with pytest.raises(ValidationError, match="without B"):
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


def test_the_archive_is_the_same_bytes_every_time_and_has_the_steps(tmp_path: Path) -> None:
    first, second = pack_code(), pack_code()
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first.content)) as archive:
        members = {member.name: member for member in archive}
    assert "nemotron/steps/peft/megatron_bridge/step.toml" in members  # through the link
    assert all(member.isfile() for member in members.values())
    assert not [name for name in members if "__pycache__" in name]
    assert first.sha256[:12] in first.name


def test_an_extra_that_lepton_has_no_field_for_is_refused_before_a_job_is_made(demo: Path) -> None:
    plan = plan_of("lepton", demo)

    def previewed(extra: dict[str, object]) -> str:
        execution = LeptonExecution.model_validate({"code_path": "/code", "extra": extra})
        run = dataclasses.replace(plan, execution=execution)
        return lepton.preview(run)["LeptonExecutor"]

    assert "retries: 0" in previewed({"retries": 0})
    for name in ("foo", "nodes", "packager"):
        with pytest.raises(NemotronError, match=f"no field {name}") as caught:
            previewed({name: 1})
        assert caught.value.code == "unknown_key"


def test_a_key_of_lepton_that_does_nothing_is_said_to(demo: Path) -> None:
    plan_of("lepton", demo)
    words = ["run.env.nprocs_per_node=8"]
    plan = build(find_step("demo/make"), overrides=words, profile=load_profile("p"))
    assert any("nprocs_per_node of the profile has no effect" in note for note in plan.notes)
    words = ["run.env.queue_priority=high-7000"]
    plan = build(find_step("demo/make"), overrides=words, profile=load_profile("p"))
    assert any("queue_priority has no effect without" in note for note in plan.notes)
    plan = build(
        find_step("demo/make"),
        overrides=[*words, "run.env.can_preempt=true"],
        profile=load_profile("p"),
    )
    assert not plan.notes


def test_what_is_no_file_is_left_out_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text("x = 1\n")
    (tmp_path / ".#plan.py").symlink_to("me@host.123:456")  # Emacs, while it is open
    os.mkfifo(tmp_path / "pipe")
    with tarfile.open(fileobj=io.BytesIO(pack_code(tmp_path).content)) as archive:
        assert archive.getnames() == ["nemotron/plan.py"]
