"""Checking values against a pydantic model, with errors that name the key, its place and a fix."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nemotron.errors import NemotronError, raise_all
from nemotron.redaction import HIDDEN, is_secret_name, looks_like_secret
from nemotron.tree import KeyPath, Node, child_at, dotted, leaves, plain, plain_scalar, transform

M = TypeVar("M", bound=BaseModel)

# Errors of fields that want text: such a field is given the text as it was typed (010, no, 1.50)
# instead of the value that YAML made of it.
_WANTS_TEXT = ("string_type", "path_type", "literal_error", "enum")
# Where pydantic's own wording does not fit after "wanted".
_WANTED = {
    "path_type": "a path",
    "string_type": "a string",
    "list_type": "a list, such as [a,b]",
    "tuple_type": "a list, such as [a,b]",
    "model_type": "a section of keys",
    "dict_type": "a section of keys",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}
_YAML_WORDS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_WORD = re.compile(r"\b(True|False|None)\b")
_LONGEST_VALUE = 80


def validate(
    tree: Node, model: type[M], *, prefix: KeyPath = (), source: str = "", what: str = "key"
) -> M:
    """Return ``tree`` as a ``model``.

    Args:
        tree: The values, each with its place.
        model: What they must be.
        prefix: Path of ``tree`` in the whole config, for messages.
        source: Place of keys that have none of their own, because they are missing.
        what: What a key is called in messages, such as ``key`` or ``profile key``.

    Raises:
        NemotronError: ``unknown_key`` and ``invalid_value``; all of them at once.
    """
    try:
        checked = model.model_validate(plain(tree))
    except ValidationError as first:
        tree = _keep_text(tree, first.errors())
        try:
            checked = model.model_validate(plain(tree))
        except ValidationError as error:
            raise_all(_explain(error, tree, model, prefix, source, what))
            raise AssertionError("a validation error without errors") from None
    raise_all(_booleans_taken_for_numbers(tree, checked, prefix))
    return checked


def refuse_secrets(tree: Node, *, references: str = "") -> None:
    """Refuse credentials written into a config or profile.

    Args:
        tree: The values.
        references: Name of a section that is left out: its values name secrets of a platform.

    Raises:
        NemotronError: ``secret_in_config``; names the key and the place, never the value.
    """
    failures: list[NemotronError] = []
    for path, node in leaves(tree):
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        if not isinstance(node.value, str) or not node.value or references in path[:-1]:
            continue
        if looks_like_secret(node.value, name) or is_secret_name(name):
            variable = name if name.isupper() else "HF_TOKEN"
            failures.append(
                NemotronError(
                    "secret_in_config",
                    f"{dotted(path)} contains what looks like a credential",
                    where=node.place,
                    why="configs and profiles are written to disk and shown; secrets must not be",
                    fix="export it as an environment variable, and name that in the profile: "
                    f'secrets = ["{variable}"]',
                )
            )
    raise_all(failures)


def refuse_home(tree: Node, *, leave_out: Collection[str]) -> None:
    """Refuse values that begin with ``~/``: no shell expands them, so ``~`` would be a directory.

    They are not expanded here either: where the job runs, the home may be another one.

    Args:
        tree: The values.
        leave_out: Keys whose values are read on this machine, by a shell or by another program.

    Raises:
        NemotronError: ``home_in_config``; all of them at once.
    """
    raise_all(
        [
            NemotronError(
                "home_in_config",
                f"{dotted(path)} is {node.value!r}; only a shell expands ~",
                where=node.place,
                fix="write the absolute path on the machine where the job runs; here it is "
                f"{os.path.expanduser(node.value)}",  # noqa: PTH111 - never fails
            )
            for path, node in leaves(tree)
            if path[0] not in leave_out and isinstance(node.value, str)
            if node.value == "~" or node.value.startswith("~/")
        ]
    )


def schema_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key that ``model`` knows, sections included."""
    keys: list[str] = []
    for field_name, field in model.model_fields.items():
        name = field.alias or field_name
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += schema_keys(section, f"{prefix}{name}.")
    return keys


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the names of ``known`` that ``name`` was probably meant to be, best first.

    A dotted name also matches by its last word, so that ``seq_length`` finds ``recipe.seq_length``.
    """
    scores = {key: _likeness(name, key) for key in known if not name.startswith(f"{key}.")}
    best = max(scores.values(), default=0.0)
    # A name that is clearly less similar than the best was hardly meant.
    near = [key for key, score in scores.items() if score > 0.0 and score >= best - 0.08]
    return sorted(near, key=lambda key: -scores[key])[:limit]


def _likeness(name: str, key: str) -> float:
    """Return how similar two names are, in [0, 1]; 0 if one was hardly meant as the other."""
    last, key_last = name.rpartition(".")[2], key.rpartition(".")[2]
    if last == key_last:
        return 1.0
    whole = difflib.SequenceMatcher(None, name, key).ratio()
    word = difflib.SequenceMatcher(None, last, key_last).ratio()
    # Dotted names of one section share most of their letters anyway.
    is_near = whole >= (0.75 if "." in name else 0.6) or word >= 0.75
    return max(whole, word) if is_near else 0.0


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a fix: the closest names, or ``otherwise`` if there are none."""
    names = closest(name, known)
    return f"did you mean {' or '.join(names)}?" if names else otherwise


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation such as ``Peft | None`` admits as a section."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [model for part in typing.get_args(annotation) for model in _sections(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []


def _keep_text(tree: Node, errors: Sequence[ErrorDetails]) -> Node:
    texts: dict[KeyPath, Node] = {}
    for error in errors:
        path = _path_of(error, tree)
        node = child_at(tree, path)
        if error["type"] not in _WANTS_TEXT or node is None or isinstance(node.value, str):
            continue
        if node.value is None and node.text:  # null, written out, is no name of anything
            continue
        # An empty text is a string, but neither a path nor a choice.
        if node.text is not None and (node.text or error["type"] == "string_type"):
            texts[path] = replace(node, value=node.text)
    return transform(tree, lambda node, path: texts.get(path, node))


def _path_of(error: ErrorDetails, tree: Node) -> KeyPath:
    """Return the config path of a pydantic location, which also names branches of unions."""
    path: KeyPath = ()
    node: Node | None = tree
    for part in error["loc"]:
        child = child_at(node, (part,)) if node else None
        if child is not None:
            path, node = (*path, part), child
    if error["type"] == "missing":
        path = (*path, error["loc"][-1])
    return path


def _explain(
    error: ValidationError,
    tree: Node,
    model: type[BaseModel],
    prefix: KeyPath,
    source: str,
    what: str,
) -> list[NemotronError]:
    failures: dict[KeyPath, NemotronError] = {}
    known = schema_keys(model)
    for details in error.errors():
        path = _path_of(details, tree)
        if path in failures:
            continue  # further branches of one union
        node = child_at(tree, path)
        where = _nearest_place(tree, path) or source
        if details["type"] == "extra_forbidden":
            failures[path] = _unknown_key(path, prefix, known, where, what)
        else:
            failures[path] = _invalid_value(details, path, prefix, node, where)
    return list(failures.values())


def _unknown_key(
    path: KeyPath, prefix: KeyPath, known: Sequence[str], where: str, what: str
) -> NemotronError:
    section = dotted(path[:-1])
    start = dotted(prefix) + "." if prefix else ""
    near = [start + key for key in closest(dotted(path), known)]
    siblings = [start + key for key in known if key.rpartition(".")[0] == section]
    owner = dotted((*prefix, *path[:-1]))
    there_are = f"{owner} has: " if owner else "the keys are: "
    return NemotronError(
        "unknown_key",
        f"unknown {what} {dotted((*prefix, *path))}",
        where=where,
        fix=f"did you mean {' or '.join(near)}?" if near else there_are + ", ".join(siblings),
    )


def _invalid_value(
    details: ErrorDetails, path: KeyPath, prefix: KeyPath, node: Node | None, where: str
) -> NemotronError:
    key = dotted((*prefix, *path))
    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if details["type"] == "missing":
        problem = f"{key} is not set"
        fix = f"pass {key}=..., or set it in the config"
    elif details["type"] in ("value_error", "assertion_error"):
        problem = f"{key}: {message}" if key else message
        fix = f"change {key}" if key else "change the values that contradict each other"
    else:
        wanted = _WANTED.get(details["type"], message.removeprefix("Input should be "))
        wanted = wanted.replace("String should match pattern", "text that fits the pattern")
        if details["type"] == "literal_error":
            wanted = _PYTHON_WORD.sub(lambda word: _YAML_WORDS[word[0]], wanted)
        got = _shown(key, _as_written(details["input"], node))
        if isinstance(details["input"], dict) and node is not None:
            got = f"a section with the keys {', '.join(map(str, details['input']))}"
        problem = f"{key} is {got}; wanted {wanted}"
        fix = f"set {key} to {wanted}"
    return NemotronError("invalid_value", problem, where=where, fix=fix)


def _nearest_place(tree: Node, path: KeyPath) -> str:
    """Return the place of a key, or of the innermost section around it that has one."""
    around = (child_at(tree, path[:length]) for length in range(len(path), -1, -1))
    return next((node.place for node in around if node and node.place), "")


def _as_written(value: Any, node: Node | None) -> Any:
    """Return a value as the user wrote it: 42 where ``_keep_text`` made "42" of it."""
    if isinstance(value, str) and node is not None and node.text == value:
        return plain_scalar(value.strip(), value)
    return value


def _shown(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    if is_secret_name(name) or (isinstance(value, str) and looks_like_secret(value, name)):
        return HIDDEN
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _booleans_taken_for_numbers(
    tree: Node, checked: BaseModel, prefix: KeyPath
) -> list[NemotronError]:
    """Return an error for each boolean under a key that wants a number: pydantic takes it as 1."""
    failures: list[NemotronError] = []
    values = checked.model_dump(by_alias=True)
    for path, node in leaves(tree):
        if not isinstance(node.value, bool):
            continue
        value: Any = values
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                break
        if isinstance(value, int | float) and not isinstance(value, bool):
            key = dotted((*prefix, *path))
            problem = f"{key} is {str(node.value).lower()}; wanted a number"
            failures.append(
                NemotronError(
                    "invalid_value", problem, where=node.place, fix=f"set {key} to a number"
                )
            )
    return failures
