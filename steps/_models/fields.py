"""Single fields of a model's config: required, held to one value, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron.errors import ExitCode, NemotronError


def required(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a field that a model cannot do without.

    Raises:
        NemotronError: ``model_unsupported``: it is absent or null.
    """
    value = config.get(key)
    if value is None:
        raise unsupported(f"the model's config has no {key}")
    return value


def refuse_other_values(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a config in which a field of ``wanted`` has another value than that, or than null.

    Raises:
        NemotronError: ``model_unsupported``, naming the first such field.
    """
    for key, value in wanted.items():
        if config.get(key, value) not in (value, None):
            raise unsupported(f"{key} is {config[key]!r}; only {value!r} is supported")


def unsupported(problem: str) -> NemotronError:
    """Return the error of a model that the model code would compute otherwise than its makers."""
    return NemotronError(
        "model_unsupported",
        problem,
        why="a field that the model code does not honour would give wrong logits silently",
        fix="use a Llama, Mistral, Qwen2 or Qwen3 model whose config has none of these",
        exit_code=ExitCode.DATA,
    )
