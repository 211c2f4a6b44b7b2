"""The README and the docs: every console block runs, and the reference is the manifests' own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the commands of a page's console blocks, in order."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_console_block_runs_in_an_empty_directory(page: Path, tmp_path: Path) -> None:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    tools = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "MAKEFILES": "",
        "MAKEFLAGS": "",
    }

    def run(command: str, make: str) -> str:
        # The quickstart is a target of the repository's Makefile, run here beside it.
        line = command.replace("make ", f"{make} --no-print-directory -f {ROOT / 'Makefile'} ")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    was_run: set[str] = set()
    for command in commands(page):
        if command not in was_run:
            run(command, "make")
        if command.startswith("make "):  # what it ran is not run again where the page shows it
            lines = run(command, "make --dry-run").splitlines()
            was_run |= {line.removeprefix(f"{ROOT}/.venv/bin/") for line in lines}


def test_the_readme_has_its_two_commands_on_the_first_screen() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:24])
    assert "$ make quickstart" in first_screen
    assert "`make test`" in first_screen


def test_the_reference_is_what_manifests_and_schemas_say() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = {path.name: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
    assert written == generate.pages(), "run python docs/generate.py"
