"""Reads single fields of a model's config, and refuses those that have another type or value."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron.errors import ExitCode, NemotronError


def required(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a field that every model must have.

    Raises:
        NemotronError: ``model_unsupported``: it is absent or null.
    """
    value = config.get(key)
    if value is None:
        raise unsupported(f"the model's config has no {key}")
    return value


def whole(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """Return a field that is a whole number of 1 or more; ``default`` where it is absent or null.

    Raises:
        NemotronError: ``model_unsupported``: it is something else, or absent without a default.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        return required(config, key)
    if type(value) is not int or value < 1:
        raise unsupported(f"{key} is {value!r}; wanted a whole number of 1 or more")
    return value


def number(config: Mapping[str, Any], key: str) -> float:
    """Return a field that is a number, or text that reads as one: YAML's ``1e-05``.

    Raises:
        NemotronError: ``model_unsupported``: it is something else, or absent.
    """
    value = required(config, key)
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise unsupported(f"{key} is {value!r}; wanted a number")
    return found


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file that a config was read from in an error about its fields."""
    try:
        yield
    except NemotronError as error:
        error.where = error.where or str(path)
        raise


def refuse_other_values(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a config in which a field of ``wanted`` has a value other than that or null.

    Raises:
        NemotronError: ``model_unsupported``, naming the first such field.
    """
    for key, value in wanted.items():
        if config.get(key, value) not in (value, None):
            raise unsupported(f"{key} is {config[key]!r}; only {value!r} is supported")


def unsupported(problem: str) -> NemotronError:
    """Return the error of a model that the model code would not compute as it was trained."""
    return NemotronError(
        "model_unsupported",
        problem,
        why="ignoring a field of the config would silently give wrong logits",
        fix="use a Llama, Mistral, Qwen2 or Qwen3 model whose config has none of these",
        exit_code=ExitCode.DATA,
    )
