"""The two references that a config or profile may make, and no others.

``${oc.env:NAME}`` and ``${oc.env:NAME,default}`` take an environment variable; ``${steps:PATH}`` is
the absolute path of a file that ships with the steps; ``\\${`` stands for a literal ``${``. A
default may hold references, ``null`` and quotes. An empty variable counts as not set. Secret
variables are refused: configs are written to disk, and a job reads secrets from its environment.

The grammar is OmegaConf's, except that a default is text: OmegaConf makes 25.1 of the default in
``${oc.env:TAG,25.10}`` and refuses ``~`` and ``=`` in one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nemotron.errors import NemotronError, raise_all
from nemotron.redaction import is_secret_name
from nemotron.tree import KeyPath, Node, dotted, parse_value

STEPS_ROOT = Path(__file__).parent / "steps"

_OPENING = re.compile(r"(\\*)\$\{")
_ENVIRONMENT = re.compile(r"\s*oc\.env\s*:\s*([A-Za-z_][A-Za-z0-9_]*)\s*([,}])")
_STEPS = re.compile(r"\s*steps\s*:\s*([^{}$]*?)\s*\}")
_QUOTED = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")\s*(?=\})""")


class _Quoted(str):
    """A quoted default: '' and 'null' are words, '3' is no number."""


@dataclass(frozen=True)
class _Variable:
    """``${oc.env:NAME,default}``; no default is None."""

    name: str
    default: tuple[_Part, ...] | None


@dataclass(frozen=True)
class _StepsPath:
    """``${steps:PATH}``."""

    path: str


_Part = str | _Variable | _StepsPath


class _GrammarError(ValueError):
    """A reference that is none of the two, or not closed; ``args[0]`` says which."""


def resolve(tree: Node) -> Node:
    """Return ``tree`` with every reference replaced by what it stands for.

    Raises:
        NemotronError: ``interpolation_invalid``, ``variable_missing``, ``secret_in_config``; every
            failing key is named.
    """
    failures: list[NemotronError] = []
    resolved = _resolve_node(tree, (), failures)
    raise_all(failures)
    return resolved


def escape(text: str) -> str:
    """Return ``text`` so that ``resolve`` gives it back unchanged."""
    return _OPENING.sub(r"\1\1\\${", text)


def _resolve_node(node: Node, path: KeyPath, failures: list[NemotronError]) -> Node:
    if isinstance(node.value, dict):
        children = {k: _resolve_node(v, (*path, k), failures) for k, v in node.value.items()}
        return replace(node, value=children)
    if isinstance(node.value, list):
        items = [_resolve_node(v, (*path, i), failures) for i, v in enumerate(node.value)]
        return replace(node, value=items)
    if not isinstance(node.value, str) or "${" not in node.value:
        return node
    try:
        return _resolve_text(node, node.value, dotted(path))
    except NemotronError as error:
        failures.append(error)
    except _GrammarError as error:
        failures.append(_invalid(f"{dotted(path)}: {error.args[0]}", node.place))
    return node


def _resolve_text(node: Node, text: str, key: str) -> Node:
    parts, _ = _parse(text, 0, is_default=False)
    used: list[str] = []
    values = [_evaluate(part, key, node.place, used) for part in parts]
    place = f"{node.place} ({', '.join(f'${name}' for name in used)})" if used else node.place
    if values == [None]:
        return replace(node, value=None, text=None, place=place)
    value = _join(values)
    is_word = len(values) == 1 and isinstance(values[0], _Quoted)
    if any(isinstance(part, _Variable) for part in parts) and not is_word:
        return replace(parse_value(value, place), overrides=node.overrides)
    return replace(node, value=value, text=value, place=place)


def _parse(text: str, start: int, *, is_default: bool) -> tuple[tuple[_Part, ...], int]:
    """Return the parts of ``text`` from ``start`` and the end: of the text, or of the default."""
    parts: list[_Part] = []
    literal = ""
    while start < len(text):
        opening = _OPENING.match(text, start)
        if is_default and text[start] == "}":
            break
        if opening is None:
            literal += text[start]
            start += 1
            continue
        start = opening.end()
        literal += "\\" * (len(opening[1]) // 2)
        if len(opening[1]) % 2 == 1:
            literal += "${"
            continue
        if literal:
            parts.append(literal)
        literal = ""
        part, start = _parse_reference(text, start)
        parts.append(part)
    if literal:
        parts.append(literal)
    return tuple(parts), start


def _parse_reference(text: str, start: int) -> tuple[_Part, int]:
    steps = _STEPS.match(text, start)
    if steps:
        return _StepsPath(steps[1]), steps.end()
    environment = _ENVIRONMENT.match(text, start)
    if not environment:
        raise _GrammarError(f"cannot resolve {text!r}: wanted ${{oc.env:NAME}} or ${{steps:PATH}}")
    if environment[2] == "}":
        return _Variable(environment[1], None), environment.end()
    quoted = _QUOTED.match(text, environment.end())
    if quoted:
        default: tuple[_Part, ...] = (_Quoted(quoted[1] if quoted[1] is not None else quoted[2]),)
        end = quoted.end()
    else:
        default, end = _parse(text, environment.end(), is_default=True)
    if end >= len(text):
        raise _GrammarError(f"cannot resolve {text!r}: a closing }} is missing")
    return _Variable(environment[1], default), end + 1


def _evaluate(part: _Part, key: str, place: str, used: list[str]) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, _StepsPath):
        return str(_steps_path(part.path, key, place))
    if is_secret_name(part.name):
        raise _secret_reference(part.name, key, place)
    value = os.environ.get(part.name)
    if value:
        used.append(part.name)
        return value
    if part.default is None:
        raise NemotronError(
            "variable_missing",
            f"{key} needs the environment variable {part.name}, which is not set",
            where=place,
            fix=f"export {part.name}=..., or pass {key}=...",
        )
    values = [_evaluate(inner, key, place, used) for inner in part.default]
    if len(values) == 1 and (values[0] is None or isinstance(values[0], _Quoted)):
        return values[0]
    text = _join(values).strip()
    return None if text == "null" else text


def _join(values: list[str | None]) -> str:
    if None in values:
        raise _GrammarError("a reference inside of text came out as null")
    return "".join(value or "" for value in values)


def _steps_path(relative: str, key: str, place: str) -> Path:
    parts = PurePosixPath(relative).parts
    path = STEPS_ROOT / relative
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts or not path.exists():
        raise _invalid(f"{key}: ${{steps:{relative}}} names nothing that ships here", place)
    return path


def _invalid(problem: str, place: str) -> NemotronError:
    return NemotronError(
        "interpolation_invalid",
        problem,
        where=place,
        fix="write ${oc.env:NAME,default} or ${steps:PATH}, or \\${ for a literal ${",
    )


def _secret_reference(name: str, key: str, place: str) -> NemotronError:
    return NemotronError(
        "secret_in_config",
        f"{key} takes its value from the secret variable {name}",
        where=place,
        why="configs and profiles are written to disk and shown; secrets must not be",
        fix=f'remove the key and list secrets = ["{name}"] in the profile; '
        "the job reads it from its environment",
    )
