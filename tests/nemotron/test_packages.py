"""nemotron.packages: what an image must have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nemotron
from nemotron.packages import JOB_PACKAGES, main

SOURCE = Path(nemotron.__file__).parent
# Of the quickstart on this host, and of speed-ups that may be absent.
NOT_NEEDED = {"matplotlib", "plotext", "kitoken", "triton"}


def imported(path: Path) -> Iterator[str]:
    """Yield the packages that a module imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_the_packages_are_those_that_the_steps_import() -> None:
    shared = ("config", "interpolation", "tree", "validation", "redaction", "packed_parquet")
    paths = [*(SOURCE / "steps").resolve().rglob("*.py"), *(SOURCE / "artifacts").glob("*.py")]
    paths += [SOURCE / f"{name}.py" for name in shared]
    found = {name for path in paths for name in imported(path)}
    found -= {*sys.stdlib_module_names, *NOT_NEEDED, "nemotron", "pydantic_core"}
    assert found | {"omegaconf"} == set(JOB_PACKAGES)


def test_nothing_is_said_where_nothing_is_missing(here: Path) -> None:
    assert main() == 0


def test_what_is_missing_is_named_with_a_fix_without_any_package(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    done = subprocess.run(
        [sys.executable, "-S", "-m", "nemotron.packages"],
        env={"PYTHONPATH": str(SOURCE.parent), "NEMOTRON_ERROR_FILE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "error[package_missing]: the job's Python 3." in done.stderr
    assert json.loads(file.read_text())["fix"].endswith("tokenizers torch xxhash pyyaml")
