"""Paths of inputs that may have wildcards, such as ``chats/*.jsonl``: what is there, and where."""

from __future__ import annotations

import fnmatch
import glob
import itertools
from pathlib import Path


def is_there(path: str) -> bool:
    """Return whether something is at ``path`` or matches it; an empty directory does not count."""
    if _is_pattern(path):
        return next(glob.iglob(path), None) is not None  # noqa: PTH207 - Path.glob wants a root
    place = Path(path)
    return any(place.iterdir()) if place.is_dir() else place.exists()


def fixed_part(path: str) -> Path:
    """Return the part of a path before the first component with a wildcard."""
    if not _is_pattern(path):
        return Path(path)
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))


def passes_by(pattern: str, output: Path) -> bool:
    """Return whether a pattern cannot match an output although it lies below the fixed part.

    ``chats-*.jsonl`` does not match ``output``, although both are in the working directory.
    """
    start = fixed_part(pattern)
    if not output.resolve().is_relative_to(start.resolve()):
        return False
    below = output.resolve().relative_to(start.resolve()).parts
    rest = Path(pattern).parts[len(start.parts) :]
    return bool(below and rest) and not fnmatch.fnmatch(below[0], rest[0])


def _is_pattern(path: str) -> bool:
    """Return whether a path has wildcards; if it exists as it stands, it has none."""
    return glob.has_magic(path) and not Path(path).exists()
