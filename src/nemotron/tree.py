"""Config values that know where they were written, and the YAML that they are read from.

Every value is a ``Node``: a section, a list or a scalar, with its place (``default.yaml:12`` or
``argument peft.dim=16``) and, for a plain scalar, its text. The text decides what YAML cannot know:
``010`` and ``1.50`` under a key that wants a string stay as they were typed.

Scalars follow the core schema of YAML 1.2: ``no``, ``on``, ``12:30`` and ``2024-01-01`` are
strings. Anchors, aliases, tags and duplicate keys are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemotron.errors import NemotronError

Scalar = str | int | float | bool | None
KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_MOST_DIGITS = 400  # a longer number is taken for text; Python refuses to parse 4300 digits


@dataclass(frozen=True)
class Node:
    """One value of a config: ``dict`` of nodes, ``list`` of nodes, or a scalar."""

    value: dict[str, Node] | list[Node] | Scalar
    place: str = ""
    text: str | None = None
    overrides: str = ""  # place of the value that this one replaced


def read_yaml(path: Path) -> Node:
    """Return the mapping in a YAML file.

    Raises:
        NemotronError: ``config_missing``, ``config_unreadable`` or ``yaml_invalid``, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NemotronError(
            "config_missing", f"no file {display(path)}", fix="check the path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise NemotronError(
            "config_unreadable",
            f"cannot read {display(path)}: {error}",
            fix="pass a readable YAML file in UTF-8",
        ) from None
    node = parse_yaml(text, display(path))
    if node.value is None:
        return Node({}, display(path))
    if not isinstance(node.value, dict):
        kind = "a list" if isinstance(node.value, list) else "a single value"
        raise _invalid(f"{display(path)} holds {kind}; wanted a mapping", f"{display(path)}:1")
    return node


def parse_yaml(text: str, source: str) -> Node:
    """Return the one document in ``text``; ``source`` is the file's name for messages and places.

    Raises:
        NemotronError: ``yaml_invalid``.
    """
    try:
        root = yaml.compose(text, Loader=_PlainLoader)
        return Node(None, f"{source}:1") if root is None else _build(root, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        parts = [part for part in (error.context, error.problem) if part]
        raise _invalid(", ".join(parts) or "not valid YAML", where) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _invalid(f"not valid YAML: {str(error).splitlines()[0]}", source) from None


def parse_value(text: str, place: str) -> Node:
    """Return the value of a ``key=value`` argument: scalar, quoted string, ``[...]`` or ``{...}``.

    Text that is not valid YAML stays a string; the schema then says what it wanted instead.
    """
    if text.strip()[:1] in ("[", "{", '"', "'"):
        try:
            return transform(parse_yaml(text, place), lambda node, _: replace(node, place=place))
        except NemotronError:
            return Node(text, place, text)
    return Node(plain_scalar(text.strip(), text), place, text)


def plain_scalar(text: str, original: str) -> Scalar:
    """Return the scalar that ``text`` spells in YAML's core schema, else ``original``."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if len(text) > _MOST_DIGITS:
        return original
    if _INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return original


def plain(node: Node) -> Any:
    """Return the value of a node as plain Python."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def from_plain(value: Any, place: str) -> Node:
    """Return a plain Python value as nodes that all have the place ``place``."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, place) for key, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, place) for item in value], place)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return Node(value, place, str(value) if is_number else None)


def for_json(value: Any) -> Any:
    """Return a plain value in which ``.inf`` and ``.nan`` replace the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value


def merge(base: Node, over: Node) -> Node:
    """Return ``base`` overridden by ``over``: sections merge key by key, all else is replaced.

    ``OmegaConf.merge`` does the same to values, but loses where they were written.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return replace(over, overrides=base.place)
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, over.place)


def transform(node: Node, change: Callable[[Node, KeyPath], Node], path: KeyPath = ()) -> Node:
    """Return ``node`` with ``change(node, path)`` in place of every value, the innermost first."""
    value = node.value
    if isinstance(value, dict):
        value = {key: transform(child, change, (*path, key)) for key, child in value.items()}
    elif isinstance(value, list):
        value = [transform(child, change, (*path, i)) for i, child in enumerate(value)]
    return change(replace(node, value=value), path)


def child_at(node: Node, path: KeyPath) -> Node | None:
    """Return the node at ``path`` below ``node``, or None."""
    for part in path:
        value = node.value
        if isinstance(value, dict) and part in value:
            node = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            node = value[part]
        else:
            return None
    return node


def leaves(node: Node, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Node]]:
    """Yield every scalar below ``node`` with its path."""
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from leaves(child, (*path, index))
    else:
        yield path, node


def dotted(path: KeyPath) -> str:
    """Return a key path as users write it: ``recipe.seq_length``, ``mounts[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def display(path: Path) -> str:
    """Return a path, relative to the working directory if it lies below that."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class _PlainLoader(yaml.SafeLoader):
    """Composes nodes only; refuses aliases, which can blow a small file up without bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not supported; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


_PlainLoader.yaml_implicit_resolvers = {}


def _build(node: yaml.Node, source: str) -> Node:
    place = f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return Node(_build_section(node, source), place)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return Node([_build(item, source) for item in node.value], place)
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        if node.style is not None:
            return Node(node.value, place)
        return Node(plain_scalar(node.value, node.value), place, node.value)
    raise _marked(f"tags are not supported (got {node.tag})", node)


def _build_section(node: yaml.MappingNode, source: str) -> dict[str, Node]:
    section: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            raise _marked("a key must be a word", key)
        if key.value in section:
            raise _marked(f"the key {key.value!r} appears twice in this section", key)
        child = _build(value, source)
        # A section or list starts on the line below its key, but users look for the key.
        section[key.value] = replace(child, place=f"{source}:{key.start_mark.line + 1}")
    return section


def _marked(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _invalid(problem: str, where: str) -> NemotronError:
    return NemotronError("yaml_invalid", problem, where=where, fix="correct the YAML at that line")
