"""nemotron.checkout: which code runs, in real checkouts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import nemotron
from nemotron import checkout, jobs

LINES = b"first\nsecond\n\n"


def git(directory: Path, *words: str) -> bytes:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(directory), *settings, *words]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the package of a checkout that this code seems to run from."""
    package = tmp_path / "checkout" / "src" / "nemotron"
    steps = tmp_path / "checkout" / "steps"
    for directory in (package, steps):
        directory.mkdir(parents=True)
        (directory / "__init__.py").touch()
    (package / "steps").symlink_to("../../steps")
    (package / "text.py").write_bytes(LINES)
    git(tmp_path, "init", "-q", "checkout")
    git(package, "add", "--all", ":/")
    git(package, "commit", "-q", "-m", "x")
    monkeypatch.setattr(nemotron, "__file__", str(package / "__init__.py"))
    return package


def is_dirty() -> bool:
    found = checkout.commit()
    assert found is not None
    return found.is_dirty


def applied(source: Path, tmp_path: Path) -> Path:
    """Return the package of another checkout of the commit, with the difference applied."""
    patch = tmp_path / "code.diff"
    jobs.write_private(patch, checkout.difference())
    git(tmp_path, "clone", "-q", str(source.parents[1]), "other")
    git(tmp_path / "other", "apply", str(patch))
    return tmp_path / "other" / "src" / "nemotron"


def test_a_clean_checkout_is_its_commit(source: Path) -> None:
    found = checkout.commit()
    assert found is not None
    assert found.sha == git(source, "rev-parse", "HEAD").decode().strip()
    assert not found.is_dirty
    assert checkout.difference() == ""


@pytest.mark.parametrize(
    "changed",
    [
        b"third\n" + LINES,  # the last line of context is blank
        b"caf\xe9\n" + LINES,  # Latin-1
        b"third\r\n" + LINES + b"no newline",
    ],
)
def test_the_difference_applies_and_gives_the_same_bytes(
    source: Path, tmp_path: Path, changed: bytes
) -> None:
    (source / "text.py").write_bytes(changed)
    assert is_dirty()
    assert (applied(source, tmp_path) / "text.py").read_bytes() == changed


@pytest.mark.parametrize("content", [b"print('new')\n", b"\0\xff" * 100])
@pytest.mark.parametrize("place", ["new.py", "steps/new.yaml"])
def test_a_file_that_git_does_not_know_is_part_of_it(
    source: Path, tmp_path: Path, place: str, content: bytes
) -> None:
    (source / place).write_bytes(content)
    assert is_dirty()
    assert (applied(source, tmp_path) / place).read_bytes() == content


def test_other_new_files_and_ignored_ones_are_not(source: Path) -> None:
    (source.parents[1] / "scratch.py").touch()
    (source.parents[1] / ".git" / "info").mkdir(exist_ok=True)
    (source.parents[1] / ".git" / "info" / "exclude").write_text("made.py\n")
    (source / "made.py").touch()
    assert not is_dirty()


def test_where_there_is_no_checkout_there_is_no_commit(source: Path) -> None:
    shutil.rmtree(source.parents[1] / ".git")
    assert checkout.commit() is None
