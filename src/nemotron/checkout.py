"""Identifies the code that runs: the commit of its checkout, and the difference from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import nemotron


class Git(BaseModel):
    """The commit of the code that ran; ``is_dirty`` if the code may differ from the commit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha: str
    is_dirty: bool


def commit() -> Git | None:
    """Return the commit of the checkout that this code runs from; None for an installed wheel."""
    source = Path(nemotron.__file__).parent
    # A wheel installed inside somebody's checkout is not tracked there: that commit is not ours.
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = _git(source, "rev-parse", "HEAD")
    changed = _git(source, "status", "--porcelain", "--untracked-files=no")
    return Git(sha=sha.strip(), is_dirty=bool(changed or _untracked(source))) if sha else None


def difference() -> str:
    """Return a patch from the commit to what runs: changed files, and untracked ones of ours.

    Bytes that are not UTF-8 are decoded with ``surrogateescape``.
    """
    source = Path(nemotron.__file__).resolve().parent
    options = ("--no-ext-diff", "--no-color", "--binary")
    patches = [_git(source, "diff", *options, "HEAD", "--", ":/")]
    top = Path((_git(source, "rev-parse", "--show-toplevel") or "").rstrip("\n"))
    for path in _untracked(source):  # named as in a patch: relative to the top of the checkout
        compare = ("--no-index", "/dev/null", str(path.relative_to(top)))
        patches.append(_git(top, "diff", *options, *compare, exit_codes=(0, 1)))
    return "".join(patch or "" for patch in patches)


def _untracked(source: Path) -> list[Path]:
    """Return the package's files that git neither tracks nor ignores: jobs are sent them too."""
    found: list[Path] = []
    for directory in (source.resolve(), (source / "steps").resolve()):
        names = _git(directory, "ls-files", "--others", "--exclude-standard", "-z") or ""
        found += [directory / name for name in names.split("\0") if name]
    return found


def _git(directory: Path, *arguments: str, exit_codes: tuple[int, ...] = (0,)) -> str | None:
    """Return what git prints; None if it fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode not in exit_codes:
        return None
    return done.stdout.decode("utf-8", "surrogateescape")
