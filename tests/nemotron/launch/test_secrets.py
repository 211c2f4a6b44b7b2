"""Six secrets through every route of a real Slurm, and a search through all that is left."""

from __future__ import annotations

import base64
import contextlib
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron.catalog import find_step
from nemotron.errors import NemotronError
from nemotron.launch import refuse_secrets_in_plan
from nemotron.plan import build
from nemotron.profile import load_profile

Nemotron = Callable[..., Any]
SECRETS = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAA1",
    "WANDB_API_KEY": "canary2" + "0123456789abcdef0123456789abcdef0",
    "NGC_API_KEY": "nvapi-canaryCCCCCCCCCCCCCCCCCCCC3",
    "AWS_SECRET_ACCESS_KEY": "canary4/with+odd=characters",
    "MY_PASSWORD": "canary5 with 'quotes' and $(echo shell)",
    "GITHUB_TOKEN": "ghp_canaryFFFFFFFFFFFFFFFFFFFFFF6",
}


def readings(content: bytes) -> Iterator[bytes]:
    """Yield what a file says, as it is and through what it may be packed in."""
    yield content
    with contextlib.suppress(OSError, EOFError, zlib.error):
        yield gzip.decompress(content)
    for token in re.findall(rb"[A-Za-z0-9+/_-]{24,}={0,2}", content):
        for text in (token, token.translate(bytes.maketrans(b"-_", b"+/"))):
            with contextlib.suppress(ValueError):
                packed = base64.b64decode(text + b"=" * (-len(text) % 4))
                yield packed
                with contextlib.suppress(zlib.error):
                    yield zlib.decompress(packed)


def found_in(content: bytes) -> list[str]:
    return [
        name
        for reading in readings(content)
        for name, value in SECRETS.items()
        if value.encode() in reading or base64.b64encode(value.encode()) in reading
    ]


def command_lines() -> bytes:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    return b"\n".join(lines)


def test_no_secret_is_left_in_a_file_a_log_or_a_command_line(
    slurm: Path,
    nemotron: Nemotron,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with (slurm / "env.toml").open("a") as file:
        file.write(f'[p]\nextends = "rig"\nsecrets = {list(SECRETS)}\n')
    run = ("steps", "run", "demo/make")
    said = [
        nemotron(*run, "-b", "p", "--dry-run"),
        nemotron(*run, "-b", "p", "--dry-run", "--json"),
    ]
    # Written out, it is refused wherever it stands.
    for name, value in SECRETS.items():
        refused = nemotron(*run, "-r", "p", f"run.env.env_vars.{name}={value}")
        assert refused.code == 2, name
        said.append(refused)
    attached = nemotron(*run, "-r", "p", "behaviour=refuse")
    assert attached.code == 4, attached.err
    names = ("ok", "die", "sleep")
    *ended, job_id = (nemotron(*run, "-b", "p", f"behaviour={n}").out.strip() for n in names)
    assert [nemotron("jobs", "wait", job).code for job in ended] == [0, 8]
    said += [attached, *(nemotron("jobs", "logs", job) for job in ended)]
    until(lambda: "making" in nemotron("jobs", "logs", job_id).out)
    assert not found_in(command_lines())
    said += [nemotron("jobs", "status", job_id), nemotron("jobs", "cancel", job_id)]
    assert nemotron("jobs", "wait", job_id).code == 130
    for result in said:
        assert not found_in(f"{result.out}{result.err}".encode())
    files = [path for path in slurm.rglob("*") if path.is_file() and path.name != "env.toml"]
    assert {"job.json", "launch.sh", "_CONFIG", "train.yaml"} <= {path.name for path in files}
    contents = {path.read_bytes(): path for path in files}  # each archive of the code once
    assert not {path: found for text, path in contents.items() if (found := found_in(text))}


def test_the_job_has_the_secrets(
    slurm: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", SECRETS["MY_PASSWORD"])
    with (slurm / "env.toml").open("a") as file:
        file.write('[p]\nextends = "rig"\nsecrets = ["MY_PASSWORD"]\n')
        file.write("setup_lines = 'echo \"$MY_PASSWORD\" | wc -c'\n")
    done = nemotron("steps", "run", "demo/make", "-r", "p")
    assert f"{len(SECRETS['MY_PASSWORD']) + 1}\n" in done.out


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_secret_among_the_arguments_of_the_job_is_refused(
    slurm: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.setenv("MY_PASSWORD", SECRETS["MY_PASSWORD"])
    words = ("steps", "run", "demo/make", "-b", "rig", *option)
    done = nemotron(*words, "--", f"--key={SECRETS['MY_PASSWORD']}")
    assert done.code == 2
    assert "error[secret_in_job]" in done.err
    assert "canary" not in done.out + done.err
    assert not (slurm / ".nemotron").exists()


@pytest.mark.parametrize(
    ("executor", "line", "where"),
    [
        ("slurm", 'run_command = "KEY=hunter2hunter2 {command}"', "run_command"),
        ("slurm", 'setup_lines = "export KEY=hunter2hunter2"', "setup_lines"),
        ("slurm", 'srun_args = ["--export=KEY=hunter2hunter2"]', "srun_args"),
        ("slurm", 'comment = "hunter2hunter2"', "comment"),
        ("slurm", 'extra = { wckey = "hunter2hunter2" }', "extra.wckey"),
        ("slurm", 'env_vars = { KEY = "hunter2hunter2" }', "env_vars.KEY"),
        ("lepton", 'pre_launch_commands = ["echo hunter2hunter2"]', "pre_launch_commands"),
        ("lepton", 'mounts = [{ path = "/hunter2hunter2", mount_path = "/x" }]', "mounts.path"),
    ],
)
def test_a_secret_in_whatever_a_profile_says_is_refused(
    demo: Path, monkeypatch: pytest.MonkeyPatch, executor: str, line: str, where: str
) -> None:
    monkeypatch.setenv("FAVOURITE_DISH", "hunter2hunter2")
    (demo / "env.toml").write_text(
        f'[p]\nexecutor = "{executor}"\nsecrets = ["FAVOURITE_DISH"]\n{line}\n'
    )
    plan = build(find_step("demo/make"), profile=load_profile("p"))
    with pytest.raises(NemotronError) as caught:
        refuse_secrets_in_plan(plan)
    assert (caught.value.code, caught.value.where) == ("secret_in_job", where)
    assert "FAVOURITE_DISH" in caught.value.problem
    assert "hunter2" not in str(caught.value)


def test_names_of_secrets_and_defaults_of_a_profile_are_not_refused(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULL_SECRET", "registry")
    monkeypatch.setenv("MY_PASSWORD", "localhost")
    pull = 'image_pull_secrets = ["registry"]\nsecret_vars = { A = "registry" }'
    for said in (f'executor = "lepton"\n{pull}', 'executor = "slurm"'):
        (demo / "env.toml").write_text(f"[p]\n{said}\n")
        refuse_secrets_in_plan(build(find_step("demo/make"), profile=load_profile("p")))
