"""Configs: YAML, ``defaults:`` and ``key=value`` in, a validated schema out, at both ends of a job.

The launcher composes a config from layers (``read_config``, ``override``), resolves its references
and validates it; the job reads the one resolved file with ``load_config`` and the same schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict

from nemotron.errors import NemotronError
from nemotron.interpolation import escape, resolve
from nemotron.redaction import redact_argv
from nemotron.tree import (
    Node,
    child_at,
    display,
    dotted,
    from_plain,
    merge,
    parse_value,
    plain,
    plain_scalar,
    read_yaml,
)
from nemotron.validation import refuse_secrets, validate

_BREAK = re.compile("[\x85\u2028\u2029]")
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Schema(BaseModel):
    """Base of every config schema: unknown keys are errors, numbers finite, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Schema)


def load_config(path: Path, schema: type[S]) -> S:
    """Return the config file of a job, resolved and validated.

    Raises:
        NemotronError: The file is missing or not YAML, a reference cannot be resolved, a key is
            unknown, a value does not fit; each with file and line.
    """
    tree = resolve(read_config(path))
    refuse_secrets(tree)
    return validate(tree, schema, source=display(path))


def read_config(path: Path) -> Node:
    """Return a config file laid on the files that its ``defaults:`` name, unresolved.

    ``defaults`` is a name or a list of names, relative to the file and with ``.yaml`` added where
    there is no suffix. Later names win over earlier ones, the file itself over all of them. A name
    may be a reference, such as ``${steps:PATH}``.

    Raises:
        NemotronError: ``defaults_invalid``, ``defaults_missing``, ``defaults_cycle``, and what
            ``read_yaml`` and ``resolve`` raise.
    """
    return _read_chain(path, ())


def override(tree: Node, arguments: Sequence[str]) -> Node:
    """Return ``tree`` with ``key=value`` arguments laid on it; later ones win.

    Raises:
        NemotronError: ``argument_invalid`` (no key), ``not_a_section`` (a key below a scalar).
    """
    for argument in arguments:
        key, equals, text = argument.partition("=")
        shown = _shown(argument)
        place = f"argument {shown}"
        if not equals or not _KEY.fullmatch(key):
            raise NemotronError(
                "argument_invalid",
                f"{shown!r} is not key=value",
                fix="write key=value, such as train.train_iters=100; -c NAME names a config",
            )
        path = tuple(key.split("."))
        _refuse_scalar_on_the_way(tree, path, place)
        layer = parse_value(text, place)
        for name in reversed(path):
            layer = Node({name: layer}, place)
        tree = merge(tree, layer)
    return tree


def dump(values: Mapping[str, Any], *, keep_steps: bool = False) -> str:
    """Return values as YAML that ``load_config`` reads back unchanged.

    With ``keep_steps``, they are what ``resolve(keep_steps=True)`` made: text yet to be resolved.
    """
    written = dict(values) if keep_steps else plain(escape(from_plain(dict(values), "")))
    return yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _read_chain(path: Path, open_files: tuple[Path, ...]) -> Node:
    node = read_yaml(path)
    assert isinstance(node.value, dict)  # noqa: S101 - read_yaml returns mappings
    own = dict(node.value)
    names = own.pop("defaults", None)
    tree = Node({}, display(path))
    for name in _default_names(names):
        base = path.parent / (name if Path(name).suffix else f"{name}.yaml")
        where = names.place if names else ""
        chain = (*open_files, path.resolve())
        if base.resolve() in chain:
            shown = " -> ".join(file.name for file in (*chain, base))
            raise NemotronError(
                "defaults_cycle",
                f"defaults form a cycle: {shown}",
                where=where,
                fix="remove one of these defaults",
            )
        if not base.is_file():
            raise _missing_base(name, base, where)
        tree = merge(tree, _read_chain(base, chain))
    return merge(tree, Node(own, display(path)))


def _default_names(node: Node | None) -> list[str]:
    if node is None or node.value is None:
        return []
    names = plain(resolve(Node({"defaults": node})))["defaults"]
    names = [names] if isinstance(names, str) else names
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return names
    raise NemotronError(
        "defaults_invalid",
        "defaults must be a file name or a list of file names",
        where=node.place,
        fix="write defaults: default.yaml, or defaults: [a.yaml, b.yaml]",
    )


def _missing_base(name: str, base: Path, where: str) -> NemotronError:
    there = sorted(path.name for path in base.parent.glob("*.y*ml")) if base.parent.is_dir() else []
    return NemotronError(
        "defaults_missing",
        f"defaults names {name!r}, but {display(base)} does not exist",
        where=where,
        fix=f"{display(base.parent)} has: {', '.join(there)}" if there else "correct the name",
    )


def _shown(argument: str) -> str:
    """Return an argument as messages show it; what a section or list holds may be secret."""
    key, equals, text = argument.partition("=")
    if equals and text.lstrip()[:1] in ("{", "["):
        return f"{key}=..."
    return redact_argv([argument])[0]


def _refuse_scalar_on_the_way(tree: Node, path: tuple[str, ...], place: str) -> None:
    for length in range(1, len(path)):
        node = child_at(tree, path[:length])
        if node is None or node.value is None:
            return
        if not isinstance(node.value, dict):
            key = dotted(path[:length])
            kind = "a list" if isinstance(node.value, list) else "a single value"
            raise NemotronError(
                "not_a_section",
                f"{dotted(path)}: {key} is {kind} and has no keys",
                where=place,
                fix=f"pass {key}=[...] as a whole"
                if isinstance(node.value, list)
                else f"pass {key}=...",
            )


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes every string that could be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(plain_scalar(text, text), str) else "'"
    if _BREAK.search(text):  # a line break of YAML 1.1, written as a space in any other style
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
