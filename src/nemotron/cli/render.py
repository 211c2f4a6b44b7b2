"""Text and data of what the command line prints; pure functions."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemotron.catalog import Step, config_names
from nemotron.jobs import Job, JobRecord
from nemotron.manifest import DeclaredArtifact
from nemotron.plan import JobPlan
from nemotron.preflight import Check, label
from nemotron.profile import Profile
from nemotron.redaction import redact_argv, redact_data
from nemotron.tree import Node, display, dotted, leaves, plain

_WIDTH = 100
_MARKS = {"ok": "ok", "pending": "pending", "failed": "FAILED"}


def step_data(step: Step) -> dict[str, Any]:
    """Return a step as ``steps list --json`` prints it."""
    manifest = step.manifest
    info = manifest.step
    return {
        "id": info.id,
        "name": info.name,
        "category": info.category,
        "description": info.description,
        "tags": list(info.tags),
        "path": str(step.directory),
        "consumes": [artifact.model_dump(mode="json") for artifact in manifest.consumes],
        "produces": [artifact.model_dump(mode="json") for artifact in manifest.produces],
        "parameters": [parameter.model_dump(mode="json") for parameter in manifest.parameters],
    }


def step_details(step: Step) -> dict[str, Any]:
    """Return a step as ``steps show --json`` prints it."""
    manifest = step.manifest
    info = manifest.step
    return step_data(step) | {
        "launch": info.launch,
        "image": info.image,
        "nodes": info.nodes,
        "gpus_per_node": info.gpus_per_node,
        "configs": config_names(step),
        "strategies": [strategy.model_dump(mode="json") for strategy in manifest.strategies],
        "errors": [entry.model_dump(mode="json") for entry in manifest.errors],
        "reference": manifest.reference,
    }


def step_table(steps: Sequence[Step]) -> str:
    """Return the steps as a table."""
    if not steps:
        return "No steps matched."
    rows = [("STEP", "CONSUMES", "PRODUCES", "NAME")]
    for step in steps:
        consumed = ", ".join(artifact.type for artifact in step.manifest.consumes)
        produced = ", ".join(artifact.type for artifact in step.manifest.produces)
        rows.append((step.id, consumed, produced, step.manifest.step.name))
    return _table(rows)


def step_tree(steps: Sequence[Step]) -> str:
    """Return the steps below their categories."""
    if not steps:
        return "No steps matched."
    lines: list[str] = []
    for category in dict.fromkeys(step.manifest.step.category for step in steps):
        lines.append(category)
        for step in steps:
            if step.manifest.step.category == category:
                lines.append(f"  {step.id.rpartition('/')[2]:<20} {step.manifest.step.name}")
    return "\n".join(lines)


def step_page(step: Step) -> str:
    """Return everything that a manifest says, for reading."""
    manifest = step.manifest
    info = manifest.step
    resources = f"{info.nodes} node(s) x {info.gpus_per_node} GPU(s)"
    parts = [
        f"{info.id} - {info.name}",
        *_wrapped(info.description, ""),
        "",
        f"Tags       {', '.join(info.tags)}",
        f"Launch     {info.launch}; on a cluster {resources}, image {info.image or 'none'}",
        f"Configs    {', '.join(config_names(step))}  ({display(step.directory / 'config')})",
        *_section("Consumes", [_artifact(artifact) for artifact in manifest.consumes]),
        *_section("Produces", [_artifact(artifact) for artifact in manifest.produces]),
        *_section(
            "Parameters",
            [
                (_parameter_head(each.name, each.default, each.choices), each.description)
                for each in manifest.parameters
            ],
        ),
        *_section(
            "Strategies", [(f"When {s.when}", f"then {s.then}") for s in manifest.strategies]
        ),
        *_section(
            "Errors",
            [
                (
                    f"{entry.name} (exit {int(entry.exit_code)})",
                    f"{entry.cause.rstrip('.')}. Fix: {entry.recovery}",
                )
                for entry in manifest.errors
            ],
        ),
        *_section("Reference", [(name, str(place)) for name, place in manifest.reference.items()]),
    ]
    return "\n".join(parts)


def plan_data(plan: JobPlan, checks: Sequence[Check]) -> dict[str, Any]:
    """Return a plan as ``steps run --dry-run --json`` prints it."""
    return {
        "step": plan.step.id,
        "config_path": str(plan.config_path),
        "executor": plan.executor,
        "profile": plan.profile.name if plan.profile else None,
        "detached": plan.is_detached,
        "nodes": plan.nodes,
        "ranks": plan.num_ranks,
        "config": redact_data(plan.config_data),
        "execution": redact_data(plan.execution.model_dump(mode="json", exclude_unset=True)),
        "overridden": _overridden(plan),
        "origins": {key: origin.place for key, origin in plan.origins.items()},
        "command": redact_argv(plan.command()),
        "environment": sorted(plan.environment),
        "secrets": list(plan.execution.secrets),
        "image": plan.image,
        "squash": plan.squash,
        "mounts": list(plan.mounts),
        "inputs": [{"type": item.type, "key": item.key, "path": item.path} for item in plan.inputs],
        "outputs": [
            {"type": item.type, "key": item.key, "path": item.path} for item in plan.outputs
        ],
        "notes": list(plan.notes),
        "checks": [check_data(check) for check in checks],
    }


def plan_text(plan: JobPlan, checks: Sequence[Check]) -> str:
    """Return a plan as ``steps run --dry-run`` prints it."""
    where = f"profile {plan.profile.name} ({plan.executor})" if plan.profile else "this host"
    how = ", detached" if plan.is_detached else ""
    values = _yaml_lines(redact_data(plan.values), _overridden(plan))
    execution = redact_data(plan.execution.model_dump(mode="json", exclude_unset=True))
    environment = [
        *sorted(plan.environment),
        *(f"{name} (secret)" for name in plan.execution.secrets),
    ]
    squash = f", imported to {plan.squash}" if plan.squash else ""
    sections = {
        f"config ({display(plan.config_path)})": values,
        "execution": _yaml_lines(execution, _overridden(plan), "run.env"),
        "command": [shlex.join(redact_argv(plan.command()))],
        "environment": environment,
        "image": [f"{plan.image or 'none'}{squash}"],
        "mounts": list(plan.mounts),
        "inputs": [f"{item.type}: {item.path or 'not set'}  ({item.key})" for item in plan.inputs],
        "outputs": [f"{item.type}: {item.path}  ({item.key})" for item in plan.outputs],
        "notes": list(plan.notes),
        "checks": check_lines(checks),
    }
    lines = [f"{label(plan)} on {where}{how}: {plan.layout}"]
    for title, content in sections.items():
        if content:
            lines += ["", title, *(f"  {line}" for line in content)]
    return "\n".join(lines)


def script_text(scripts: Mapping[str, str]) -> str:
    """Return the scripts of a submission, each whole below its name."""
    return "".join(f"\n----- {name}\n{text.rstrip()}\n" for name, text in scripts.items())


def check_lines(checks: Sequence[Check]) -> list[str]:
    """Return a line per check."""
    return [f"{_MARKS[check.status]:<8} {check.text}" for check in checks]


def check_data(check: Check) -> dict[str, Any]:
    """Return a check as JSON has it."""
    error = check.error.to_dict() if check.error else None
    return {"status": check.status, "text": check.text, "error": error}


def profile_rows(tables: Mapping[str, Node]) -> list[dict[str, str]]:
    """Return the profiles as ``profiles list --json`` prints them."""
    rows = []
    for name, table in sorted(tables.items()):
        written = plain(table)
        rows.append(
            {
                "name": name,
                "executor": str(_inherited(written, "executor", tables) or "local"),
                "extends": str(written.get("extends", "")),
                "file": table.place.partition(" [")[0],
            }
        )
    return rows


def profile_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the profiles as a table."""
    heads = ("name", "executor", "extends", "file")
    shown = [tuple(head.upper() for head in heads)]
    return _table([*shown, *(tuple(row[head] for head in heads) for row in rows)])


def profile_data(profile: Profile) -> dict[str, Any]:
    """Return a profile as ``profiles show --json`` prints it."""
    return {
        "name": profile.name,
        "executor": profile.executor,
        "values": redact_data(plain(profile.values)),
        "origins": {dotted(path): node.place for path, node in leaves(profile.values)},
    }


def profile_page(profile: Profile) -> str:
    """Return a profile, for reading."""
    origins = {dotted(path): node.place for path, node in leaves(profile.values)}
    lines = _yaml_lines(redact_data(plain(profile.values)), origins)
    return "\n".join([f"{profile.name} ({profile.executor})", *(f"  {line}" for line in lines)])


def job_table(jobs: Sequence[Job]) -> str:
    """Return the jobs as a table."""
    if not jobs:
        return "No jobs here."
    rows = [("JOB", "STATUS", "EXIT", "STARTED", "PROFILE", "SCHEDULER ID")]
    for job in jobs:
        record = job.record
        code = "" if record.exit_code is None else str(record.exit_code)
        placed = record.placement.id if record.placement else ""
        when = record.started or record.queued
        rows.append((record.id, record.status, code, when, record.profile or "", placed))
    return _table(rows)


def job_page(record: JobRecord) -> str:
    """Return one job's record, for reading."""
    facts = {
        "job": record.id,
        "step": record.step,
        "profile": record.profile or "none",
        "status": record.status,
        "exit code": "" if record.exit_code is None else str(record.exit_code),
        "queued": record.queued,
        "started": record.started or "",
        "ended": record.ended or "",
        "reason": record.reason,
        "scheduler": _placement(record),
        "restarts": str(record.restarts) if record.restarts else "",
        "host": f"{record.host} (pid {record.pid})",
        "directory": record.directory,
        "command": shlex.join(record.command),
        "log": record.log,
        "error": f"[{record.error['code']}] {record.error['problem']}" if record.error else "",
        "fix": record.error.get("fix", "") if record.error else "",
    }
    return "\n".join(f"{name:<10} {text}" for name, text in facts.items() if text)


def _placement(record: JobRecord) -> str:
    place = record.placement
    if place is None:
        return ""
    where = f" through {place.host}" if place.host else ""
    return f"{place.executor} job {place.id}{where}, {place.directory}"


def _inherited(table: Mapping[str, Any], key: str, tables: Mapping[str, Node]) -> Any:
    """Return a key of a profile, or of the nearest profile that it extends which has the key."""
    seen: set[str] = set()
    while key not in table and isinstance(parent := table.get("extends"), str):
        if parent in seen or parent not in tables:
            return None
        seen.add(parent)
        table = plain(tables[parent])
    return table.get(key)


def _overridden(plan: JobPlan) -> dict[str, str]:
    """Return the origin of each value that replaced another, or is from outside of the step."""
    directory = f"{display(plan.config_path.parent)}/"
    shown: dict[str, str] = {}
    for key, origin in plan.origins.items():
        from_file = origin.place.startswith(directory) and "$" not in origin.place
        if not from_file or origin.overrides:
            over = f", over {origin.overrides}" if origin.overrides else ""
            shown[key] = f"{origin.place}{over}".replace(directory, "")
    return shown


def _yaml_lines(values: Any, origins: dict[str, str], prefix: str = "") -> list[str]:
    """Return values as lines of YAML, with the origin of overridden ones as a comment."""
    lines: list[str] = []
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            lines += [f"{key}:", *(f"  {line}" for line in _yaml_lines(value, origins, path))]
            continue
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        shown = text.removesuffix("\n").removesuffix("\n...")
        origin = origins.get(path) or origins.get(f"{path}[0]")
        lines.append(f"{key}: {shown}" + (f"  # {origin}" if origin else ""))
    return lines


def _artifact(artifact: DeclaredArtifact) -> tuple[str, str]:
    optional = "" if artifact.required else " (optional)"
    keys = f" [{', '.join(artifact.keys)}]" if artifact.keys else ""
    return f"{artifact.type}{optional}", f"{artifact.description}{keys}"


def _parameter_head(name: str, default: Any, choices: Sequence[Any]) -> str:
    head = name if default is None else f"{name}={default}"
    return f"{head} ({', '.join(map(str, choices))})" if choices else head


def _section(title: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    if not entries:
        return []
    lines = ["", title]
    for head, text in entries:
        lines += [f"  {head}", *_wrapped(text, "    ")]
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
