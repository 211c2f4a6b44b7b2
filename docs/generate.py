"""Writes docs/reference from the manifests and schemas; a test checks that it is up to date.

Run as ``python docs/generate.py``.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nemotron import catalog
from nemotron.errors import ExitCode

REFERENCE = Path(__file__).parent / "reference"
EXIT_CODES = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "the job ran and failed",
    ExitCode.USAGE: "usage or config; nothing was started",
    ExitCode.PREFLIGHT: "a check before the start failed; nothing was started",
    ExitCode.DATA: "bad data: inputs that contradict each other or are damaged",
    ExitCode.NUMERIC: "a loss or gradient that is not finite",
    ExitCode.IO: "could not read or write",
    ExitCode.LOCKED: "another run writes to the same output",
    ExitCode.RANK_DIED: "a rank of the job died",
    ExitCode.SUBMISSION: "the scheduler or service refused the job",
    ExitCode.PREEMPTED: "stopped from outside, saved, resumable",
    ExitCode.INTERRUPTED: "Ctrl-C",
}


def main() -> None:
    """Write all pages."""
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Return the reference pages by file name."""
    steps = {
        f"{step.manifest.step.id.replace('/', '-')}.md": step_page(step)
        for step in catalog.find_steps()
    }
    return steps | {"exit-codes.md": exit_codes_page()}


def exit_codes_page() -> str:
    """Return the table of exit codes."""
    rows = [(str(int(code)), meaning) for code, meaning in EXIT_CODES.items()]
    return "# Exit codes\n\nOf `nemotron` and of every step.\n\n" + table(("code", "meaning"), rows)


def step_page(step: catalog.Step) -> str:
    """Return the page of one step."""
    manifest = step.manifest
    described = {each.name: each.description for each in manifest.parameters}
    module = importlib.import_module(f"nemotron.steps.{manifest.step.id.replace('/', '.')}.schema")
    artifacts = [
        (
            direction,
            f"`{each.type}`",
            ", ".join(f"`{key}`" for key in each.keys),
            "yes" if each.required else "no",
            each.description,
        )
        for direction, group in (("in", manifest.consumes), ("out", manifest.produces))
        for each in group
    ]
    errors = [
        (f"`{each.name}`", str(int(each.exit_code)), each.cause, each.recovery)
        for each in manifest.errors
    ]
    strategies = [f"- When {each.when}: {each.then.rstrip('.')}." for each in manifest.strategies]
    parts = [
        f"# {manifest.step.id}",
        manifest.step.description,
        "## Artifacts",
        table(("", "type", "config keys", "required", "what"), artifacts),
        "## Strategies",
        "\n".join(strategies),
        "## Errors",
        table(("name", "exit code", "cause", "recovery"), errors),
        "## Config keys",
        table(("key", "type", "default", "what"), list(keys(module.Config, described))),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def keys(
    model: type[BaseModel], described: dict[str, str], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and meaning of every config key, sections flattened."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, described, f"{key}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{plain(default)}`"
        meaning = described.get(key) or field.description or ""
        yield f"`{key}`", f"`{type_name(field.annotation)}`", shown, meaning


def type_name(annotation: Any) -> str:
    """Return a type as people write it: ``int``, ``str or null``, one of its literals."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return type_name(arguments[0])
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(plain(value) for value in arguments)
    if not arguments:
        return "null" if annotation is type(None) else getattr(annotation, "__name__", "any")
    origin = typing.get_origin(annotation)
    if origin in (tuple, list, dict):
        return "mapping" if origin is dict else "list"
    return " or ".join(type_name(part) for part in arguments)


def plain(value: Any) -> str:
    """Return a default as it is written in YAML."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(plain, value))}]"
    return str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped) + "\n"


if __name__ == "__main__":
    main()
