"""Profiles: where a job runs, read from ``profiles/*.toml`` and ``env.toml``.

Both are looked for in the working directory and upward, up to the first directory with a
``pyproject.toml``. Every table is a profile, except for the reserved ones. A profile in
``env.toml`` (or in the file that ``NEMOTRON_ENV_FILE`` names) replaces one of the same name in
``profiles/``; ``local`` exists without any file. Each executor has its schema, in which unknown
keys are errors; options that the executor has and the schema lacks go into ``extra``.
"""

from __future__ import annotations

import datetime
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nemotron
from nemotron.errors import NemotronError, writing
from nemotron.executors import EXECUTORS, WITHOUT_EFFECT, Execution
from nemotron.interpolation import resolve
from nemotron.tree import Node, child_at, display, dotted, from_plain, leaves, merge, plain
from nemotron.validation import did_you_mean, refuse_home, refuse_secrets, validate

RESERVED = ("wandb", "cli", "cache", "artifacts")
# Keys that may begin with ~: shell code, paths read on this machine, variables that the programs of
# the job read, and keys that have no effect.
_HOME_KNOWN = (
    *("startup_commands", "setup_lines", "pre_launch_commands", "run_command"),
    *("identity", "env_vars"),
    *WITHOUT_EFFECT,
)
ENV_FILE_VARIABLE = "NEMOTRON_ENV_FILE"
BUILT_IN = {"local": from_plain({"executor": "local"}, "built in")}


@dataclass(frozen=True)
class Profile:
    """A profile: its executor, its resolved keys with their places, and the same as a schema.

    ``notes`` are about tables beside it that have no effect.
    """

    name: str
    executor: str
    values: Node
    execution: Execution
    notes: tuple[str, ...] = ()


def load_profile(name: str, start: Path | None = None) -> Profile:
    """Return the profile ``name`` of the files found from ``start`` (the working directory) upward.

    Raises:
        NemotronError: ``profile_unknown``, ``profile_invalid``, ``profile_cycle``, an unknown key,
            a value that does not fit, a secret.
    """
    tables = read_tables(start or Path.cwd())
    values = _extended(name, tables, ())
    assert isinstance(values.value, dict)  # noqa: S101 - read_tables holds tables only
    keys = dict(values.value)
    executor = _executor_of(keys.pop("executor", None), name)
    keys.pop("extends", None)
    written = Node(keys, values.place)
    if executor != "local":
        _refuse_files_of_steps(written)
    tree = _without_empty_variables(resolve(written), written)
    refuse_secrets(tree, references="secret_vars")
    refuse_home(tree, leave_out=_HOME_KNOWN)
    what = f"{executor} profile key"
    execution = validate(tree, EXECUTORS[executor], source=values.place, what=what)
    return Profile(name, executor, tree, execution, tuple(_unused(start or Path.cwd())))


def read_tables(start: Path) -> dict[str, Node]:
    """Return every profile table that applies in ``start``, unresolved.

    Raises:
        NemotronError: ``profile_invalid`` (not TOML, or one name in two files of ``profiles/``).
    """
    tables: dict[str, Node] = {}
    for path in _profile_files(start):
        for name, table in _read_file(path):
            if name in tables:
                raise NemotronError(
                    "profile_invalid",
                    f"[{name}] is defined in {tables[name].place} and in {display(path)}",
                    where=display(path),
                    fix="rename one of them",
                )
            tables[name] = table
    env_file = _env_file(start)
    return BUILT_IN | tables | (dict(_read_file(env_file)) if env_file else {})


def write_template(executor: str, directory: Path | None = None) -> Path:
    """Write the template of an executor to ``profiles/`` and return the file.

    Raises:
        NemotronError: ``profile_exists``.
    """
    path = (directory or Path("profiles")) / f"{executor}.toml"
    package = Path(nemotron.__file__).parent
    # In a wheel beside the modules, in a checkout at its root.
    places = (package / "profiles", package.parents[1] / "profiles")
    source = next(place for place in places if place.is_dir()) / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path), path.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise NemotronError(
            "profile_exists",
            f"{path} already exists",
            where=str(path),
            fix=f"edit it, or remove it first: rm {path}",
        ) from None
    return path


def _upward(start: Path) -> Iterator[Path]:
    for directory in (start, *start.parents):
        yield directory
        if (directory / "pyproject.toml").is_file():
            return


def _profile_files(start: Path) -> list[Path]:
    for directory in _upward(start):
        files = sorted((directory / "profiles").glob("*.toml"))
        if files:
            return files
    return []


def _env_file(start: Path) -> Path | None:
    named = os.environ.get(ENV_FILE_VARIABLE)
    if not named:
        candidates = (directory / "env.toml" for directory in _upward(start))
        return next((path for path in candidates if path.is_file()), None)
    path = Path(named).expanduser()
    if not path.is_file():
        raise NemotronError(
            "profile_invalid",
            f"no file {named}",
            where=ENV_FILE_VARIABLE,
            fix=f"point {ENV_FILE_VARIABLE} at a file with profiles, or unset it",
        )
    return path


def _read_file(path: Path) -> Iterator[tuple[str, Node]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise NemotronError(
            "profile_invalid",
            f"cannot read {display(path)}: {error}",
            where=display(path),
            fix="make it a readable TOML file in UTF-8",
        ) from None
    for name, table in content.items():
        if name in RESERVED:
            continue
        if not isinstance(table, dict):
            raise NemotronError(
                "profile_invalid",
                f"{name} is outside any table",
                where=display(path),
                fix="move it below the [profile] that it belongs to",
            )
        _refuse_times(table, f"{display(path)} [{name}]")
        yield name, from_plain(table, f"{display(path)} [{name}]")


def _refuse_times(table: Mapping[str, object], place: str) -> None:
    """Refuse values that TOML reads as a time or date: Slurm's times are text."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            _refuse_times(value, f"{place} {key}")
        elif isinstance(value, datetime.time | datetime.date):
            raise NemotronError(
                "profile_invalid",
                f"{key} = {value} is not in quotes",
                where=place,
                fix=f'put it in quotes: {key} = "{value}"',
            )


def _unused(start: Path) -> Iterator[str]:
    """Yield a line per table of settings of other tools: ours are keys of configs."""
    env_file = _env_file(start)
    for path in (*_profile_files(start), *([env_file] if env_file else [])):
        for name in tomllib.loads(path.read_text(encoding="utf-8")).keys() & {*RESERVED}:
            instead = "; pass logger.wandb_project=NAME" if name == "wandb" else ""
            yield f"[{name}] in {display(path)} has no effect{instead}"


def _extended(name: str, tables: dict[str, Node], below: tuple[str, ...]) -> Node:
    """Return a table merged over the one that it extends: tables merge, lists are replaced."""
    if name in below:
        circle = " -> ".join((*below, name))
        raise NemotronError(
            "profile_cycle",
            f"profiles extend each other in a cycle: {circle}",
            where=tables[name].place,
            fix="remove one of these extends",
        )
    if name not in tables:
        raise _unknown(name, tables, below)
    parent = child_at(tables[name], ("extends",))
    if parent is None:
        return tables[name]
    if not isinstance(parent.value, str):
        raise NemotronError(
            "profile_invalid",
            f"extends is {plain(parent)!r}; wanted the name of one profile",
            where=parent.place,
            fix='write extends = "name"',
        )
    return merge(_extended(parent.value, tables, (*below, name)), tables[name])


def _unknown(name: str, tables: dict[str, Node], below: tuple[str, ...]) -> NemotronError:
    there_are = f"choose from: {', '.join(sorted(tables))}; define others in profiles/ or env.toml"
    fix = did_you_mean(name, tables, there_are)
    if below:
        problem = f"[{below[-1]}] extends {name!r}, which is not a profile"
        return NemotronError("profile_unknown", problem, where=tables[below[-1]].place, fix=fix)
    if name in RESERVED:
        problem = f"[{name}] is reserved for settings and is not a profile"
        return NemotronError("profile_unknown", problem, fix=fix)
    return NemotronError("profile_unknown", f"no profile {name!r}", fix=fix)


def _executor_of(node: Node | None, name: str) -> str:
    if node is None:
        return "local"
    if not isinstance(node.value, str) or node.value not in EXECUTORS:
        raise NemotronError(
            "executor_unknown",
            f"profile {name!r} has executor {plain(node)!r}",
            where=node.place,
            fix=did_you_mean(
                str(plain(node)), EXECUTORS, f"executor is one of: {', '.join(EXECUTORS)}"
            ),
        )
    return node.value


def _refuse_files_of_steps(written: Node) -> None:
    """Refuse references to files of the steps: they would be paths on this machine."""
    for path, node in leaves(written):
        if isinstance(node.value, str) and "${steps:" in node.value:
            raise NemotronError(
                "profile_invalid",
                f"{dotted(path)} uses ${{steps:...}}, which a profile for another machine cannot",
                where=node.place,
                fix="use such references in a config; they are resolved where the job runs",
            )


def _without_empty_variables(resolved: Node, written: Node) -> Node:
    """Drop ``env_vars`` whose reference is empty, so that they do not hide the job's own value."""
    variables, before = child_at(resolved, ("env_vars",)), child_at(written, ("env_vars",))
    if variables is None or before is None or not isinstance(variables.value, dict):
        return resolved
    kept = {
        name: node
        for name, node in variables.value.items()
        if node.value != "" or "${" not in str(getattr(child_at(before, (name,)), "value", ""))
    }
    assert isinstance(resolved.value, dict)  # noqa: S101 - a table
    return Node({**resolved.value, "env_vars": Node(kept, variables.place)}, resolved.place)
