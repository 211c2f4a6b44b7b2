"""Resolves the references of a config or profile: three kinds, in OmegaConf's grammar.

``${KEY}`` is another value of the same config (``${.KEY}`` one beside this one),
``${oc.env:NAME,default}`` an environment variable, and ``${steps:PATH}`` the absolute path of a
file that ships with the steps; ``\\${`` stands for a literal ``${``. An empty variable counts as
not set. Secret variables are refused: configs are written to disk, and a job reads its secrets from
the environment.

OmegaConf parses and evaluates the text. The values are looked up here, so that each keeps its place
and its spelling (OmegaConf would turn a tag 25.10 into 25.1), and because a resolver that is
registered with OmegaConf is one for the whole process.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from nemotron.errors import NemotronError, raise_all
from nemotron.redaction import is_secret_name
from nemotron.tree import KeyPath, Node, child_at, dotted, leaves, parse_value, transform
from nemotron.validation import did_you_mean

STEPS_ROOT = Path(__file__).parent / "steps"

# Stands for the "${steps:" of a kept reference until all is resolved, to distinguish it from text.
_KEPT = "\0{steps:"
_OPENING = re.compile(r"(\\*)(\$\{|\0\{steps:)")
_KEY_PART = re.compile(r"[^.\[\]]+")
# Characters of a value that is referred to: references to references could grow without bound.
_MOST_CHARACTERS = 20_000
_FIX = (
    "write ${KEY}, ${oc.env:NAME,default} or ${steps:PATH}; put a default with unusual characters "
    "in quotes; write \\${ for a literal ${"
)


def resolve(tree: Node, *, keep_steps: bool = False) -> Node:
    r"""Return ``tree`` with every reference replaced by its value.

    With ``keep_steps``, ``${steps:PATH}`` is checked but kept: the job resolves it on its machine.
    The result is then text that is yet to be resolved, in which a literal ``${`` is ``\${``.

    Raises:
        NemotronError: ``interpolation_invalid``, ``variable_missing``, ``secret_in_config``; every
            failing key is named.
    """
    resolution = _Resolution(tree, keep_steps)
    resolved = transform(tree, resolution.resolve)
    raise_all(resolution.failures)
    return escape(resolved) if keep_steps else resolved


def escape(tree: Node) -> Node:
    """Return ``tree`` escaped, so that ``resolve`` gives back the original."""

    def escaped(node: Node, _path: KeyPath) -> Node:
        if not isinstance(node.value, str):
            return node
        return replace(node, value=_OPENING.sub(_escaped, node.value))

    return transform(tree, escaped)


def _escaped(opening: re.Match[str]) -> str:
    is_kept = opening[2] == _KEPT
    return opening[1] * 2 + ("${steps:" if is_kept else "\\${")


@dataclass(frozen=True)
class _Found:
    """The value of a reference, or the error that it has none: raised only if it is used."""

    outcome: Node | NemotronError

    def node(self) -> Node:
        if isinstance(self.outcome, NemotronError):
            raise self.outcome
        return self.outcome

    def __str__(self) -> str:
        """Return the value as it was written, for OmegaConf to insert into text."""
        node = self.node()
        if isinstance(node.value, str):
            return node.value
        if node.value is not None and node.text is not None:
            return node.text.strip()
        kinds = {dict: "a section", list: "a list", type(None): "null"}
        got = kinds.get(type(node.value), f"{node.value!r} without quotes")
        raise ValueError(f"a reference inside text resolves to {got}; wanted a string")


class _Resolution:
    """One pass over a config, in which every value is evaluated once."""

    def __init__(self, root: Node, keep_steps: bool) -> None:
        self.failures: list[NemotronError] = []
        self._root = root
        self._keep_steps = keep_steps
        self._done: dict[KeyPath, Node] = {}
        self._open: list[KeyPath] = []  # values under evaluation; each one refers to the next

    def resolve(self, node: Node, path: KeyPath) -> Node:
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        if path in self._open:
            circle = " -> ".join(map(dotted, (*self._open[self._open.index(path) :], path)))
            raise ValueError(f"references form a cycle: {circle}")
        if path not in self._done:
            self._open.append(path)
            try:
                self._done[path] = self._evaluate(node, node.value, path)
            except NemotronError as error:
                self.failures.append(error)
                self._done[path] = node
            finally:
                self._open.pop()
        return self._done[path]

    def _evaluate(self, node: Node, text: str, path: KeyPath) -> Node:
        from omegaconf.errors import OmegaConfBaseException
        from omegaconf.grammar_parser import parse
        from omegaconf.grammar_visitor import GrammarVisitor

        used: list[str] = []

        def find_key(key: Any, _memo: object) -> Any:
            name = getattr(key, "raw", key)  # OmegaConf 2.3 passes the text alone
            used.append(f"${{{name}}}")
            return self._find_key(name, path, node.place)

        def call(name: str, args: tuple[Any, ...], args_str: tuple[str, ...]) -> _Found:
            if name == "oc.env" and len(args) in (1, 2):
                return _variable(args, args_str, dotted(path), node.place, used)
            if name == "steps" and len(args) <= 1:
                relative = "".join(map(str, args))
                here = str(_steps_path(relative))
                return _Found(Node(f"{_KEPT}{relative}}}" if self._keep_steps else here))
            raise ValueError(f"{name} with {len(args)} argument(s) is not a supported reference")

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # OmegaConf warns of an argument left empty
                value = GrammarVisitor(find_key, call, None).visit(parse(text))
        except (OmegaConfBaseException, ValueError, RecursionError, Warning) as error:
            reason = str(error).partition("\n")[0]
            problem = f"{dotted(path)}: cannot resolve {text!r}: {reason}"
            raise _invalid(problem, node.place, _FIX) from None
        found = value.node() if isinstance(value, _Found) else Node(value)
        place = f"{node.place} ({', '.join(used)})" if used else node.place
        return replace(found, place=place, overrides=node.overrides)

    def _find_key(self, name: str, path: KeyPath, place: str) -> _Found:
        num_dots = len(name) - len(name.lstrip("."))
        target = path[:-num_dots] if num_dots else ()
        for part in _KEY_PART.findall(name):
            around = child_at(self._root, target)
            is_item = around is not None and isinstance(around.value, list) and part.isdecimal()
            target = (*target, int(part) if is_item else part)
        node = child_at(self._root, target)
        if node is None:
            known = [dotted(leaf) for leaf, _ in leaves(self._root) if leaf != path]
            problem = f"{dotted(path)}: cannot resolve ${{{name}}}: no key {dotted(target)}"
            raise _invalid(problem, place, did_you_mean(dotted(target), known, _FIX))
        found = transform(node, self.resolve, target)
        if sum(1 + len(str(leaf.value)) for _, leaf in leaves(found)) > _MOST_CHARACTERS:
            raise ValueError(f"{dotted(target)} is too long for a reference")
        return _Found(found)


def _variable(
    args: tuple[Any, ...], written: tuple[str, ...], key: str, place: str, used: list[str]
) -> _Found:
    name = str(args[0])
    if is_secret_name(name):
        raise _secret_reference(name, key, place)
    value = os.environ.get(name)
    if value:
        used.append(f"${name}")
        return _Found(parse_value(value, place))
    if len(args) == 1:
        problem = f"{key} needs the environment variable {name}, which is not set"
        fix = f"export {name}=..., or pass {key}=..."
        return _Found(NemotronError("variable_missing", problem, where=place, fix=fix))
    default, text = args[1], written[1]
    if isinstance(default, _Found):
        return default
    if isinstance(default, str) and text[0] in "'\"":
        return _Found(Node(default))
    if not isinstance(default, str) and "${" in text:
        raise ValueError("a list or section used as a default cannot contain references")
    # A number as it was written: 25.10 must not become 25.1.
    return _Found(parse_value(default if isinstance(default, str) else text, place))


def _steps_path(relative: str) -> Path:
    parts = PurePosixPath(relative).parts
    path = STEPS_ROOT / relative
    if not parts or PurePosixPath(relative).is_absolute() or ".." in parts or not path.exists():
        raise ValueError(f"no file {relative!r} ships with the steps")
    return path


def _invalid(problem: str, place: str, fix: str) -> NemotronError:
    return NemotronError("interpolation_invalid", problem, where=place, fix=fix)


def _secret_reference(name: str, key: str, place: str) -> NemotronError:
    return NemotronError(
        "secret_in_config",
        f"{key} takes its value from the secret variable {name}",
        where=place,
        why="configs and profiles are written to disk and shown; secrets must not be",
        fix=f'remove the key and list secrets = ["{name}"] in the profile; '
        "the job reads it from its environment",
    )
