"""Container images on a real Slurm, with stand-ins for pyxis and enroot (see rig/)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Nemotron = Callable[..., Any]
RUN = ("steps", "run", "demo/make", "-r", "box")


@pytest.fixture
def pyxis(slurm_rig: Path) -> None:
    """Skip where there are no containers."""
    if not (slurm_rig / "pyxis.so").exists():
        pytest.skip("the stand-in for pyxis needs gcc, libslurm-dev and squashfs-tools")


@pytest.fixture
def box(pyxis: None, slurm: Path) -> Path:
    """Return the directory for images and jobs; profile ``box`` runs in a container."""
    with (slurm / "env.toml").open("a") as file:
        file.write(f'[box]\nextends = "rig"\nremote_job_dir = "{slurm}/jobs"\n')
        file.write('container_image = "registry.example/team/demo:1"\n')
    return slurm / "jobs"


def show_image(directory: Path) -> str:
    """Return the argument that makes a job say which image it is in."""
    python = (directory.parent / "env.toml").read_text().partition('["')[2].partition('"]')[0]
    return f"run.env.startup_commands=['{python}', 'cat /etc/rig-image']"


def test_an_image_is_imported_once_and_again_with_force_squash(
    box: Path, nemotron: Nemotron
) -> None:
    words = (*RUN, show_image(box))
    plan = nemotron(*words, "--dry-run", "--json").data
    first = nemotron(*words)
    assert first.code == 0, first.err + first.out
    assert f"importing registry.example/team/demo:1 to {plan['squash']}" in first.err
    image = next(line for line in first.out.splitlines() if line.startswith("docker://"))
    assert image.startswith("docker://registry.example#team/demo:1 ")
    again = nemotron(*words)
    assert "importing" not in again.err
    assert image in again.out
    forced = nemotron(*words, "--force-squash")
    assert image not in forced.out
    assert "docker://registry.example#team/demo:1 " in forced.out
    assert [path.suffix for path in sorted(box.glob("registry*"))] == [".sqsh", ".lock"]
    # A file of one's own is used as it is.
    own = (f"run.env.container_image={plan['squash']}", "--force-squash", "--dry-run", "--json")
    of_own = nemotron(*words, *own).data
    assert of_own["squash"] is None
    assert f"--container-image {plan['squash']}" in of_own["scripts"]["sbatch"]
    assert any("--force-squash has no effect" in note for note in of_own["notes"])


def test_an_image_that_cannot_be_imported_ends_the_run_with_the_reason(
    box: Path, nemotron: Nemotron
) -> None:
    done = nemotron(*RUN, "run.env.container_image=registry.example/missing:1")
    assert done.code == 9
    assert "error[squash_failed]" in done.err
    assert "401 Unauthorized" in done.err
    assert not list(box.glob("*.sqsh"))


def test_an_import_that_is_killed_leaves_nothing_that_looks_ready(
    box: Path, nemotron: Nemotron, launcher: Callable[..., Any], until: Callable[..., Any]
) -> None:
    with launcher(*RUN, "run.env.container_image=registry.example/slow:1") as process:
        until(lambda: list(box.glob("*.partial.*")))
        subprocess.run(["scancel", "--name=nemotron-squash"], check=True)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 9, err
    assert not list(box.glob("*.sqsh"))


def test_a_secret_of_the_profile_stands_over_that_of_the_image(
    box: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    show = show_image(box).replace("cat /etc/rig-image", "echo $HF_TOKEN and $RIG_OPINION")
    assert "from-the-image and from-the-image\n" in nemotron(*RUN, show).out
    ours = nemotron(*RUN, show, "run.env.secrets=[HF_TOKEN]")
    assert "hunter2hunter2 and from-the-image\n" in ours.out


def test_a_directory_with_a_space_in_its_name_is_mounted(
    box: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = box.parent / "my run $(touch canary)"
    here.mkdir()
    monkeypatch.chdir(here)
    done = nemotron(*RUN)
    assert done.code == 0, done.err + done.out
    assert (here / "out" / "make" / "made.txt").is_file()
    assert not list(box.parent.rglob("canary"))


@pytest.mark.usefixtures("pyxis")
def test_over_ssh_the_workspace_is_there_before_it_is_mounted(
    over_ssh: Path, nemotron: Nemotron
) -> None:
    image = "run.env.container_image=registry.example/team/demo:1"
    done = nemotron("steps", "run", "demo/make", "-r", "far", image)
    assert done.code == 0, done.err + done.out
    assert (over_ssh / "far" / "workspace" / "out" / "make" / "made.txt").is_file()
