"""Refuses plans whose files would hold a secret, whichever backend runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from nemotron.errors import NemotronError
from nemotron.plan import JobPlan
from nemotron.redaction import redact_argv, redact_text, secret_values

# Fields with names of secrets, not values; env_vars is checked as plan.environment.
_NOT_VALUES = {"secrets", "secret_vars", "image_pull_secrets", "env_vars"}


def refuse_secrets_in_plan(plan: JobPlan) -> None:
    """Refuse a plan whose files would hold a secret: a job's files are written to disk and shown.

    Raises:
        NemotronError: ``secret_in_job``.
    """
    known = secret_values(os.environ, plan.execution.secrets)
    arguments = list(plan.arguments)
    if redact_argv(arguments, known) != arguments:
        raise _refusal("an argument of the run module", "after --", "".join(arguments), known)
    for where, text in _texts(plan):
        if redact_text(text, known) != text:
            raise _refusal(f"the value of {where}", where, text, known)


def _texts(plan: JobPlan) -> Iterator[tuple[str, str]]:
    """Yield every other text that is written for a job, with the key that it comes from."""
    yield from _leaves(plan.values)
    yield from ((f"env_vars.{name}", value) for name, value in plan.environment.items())
    # A default is no secret, even if somebody's password is the same word.
    said = plan.execution.model_dump(by_alias=True, exclude_defaults=True, exclude=_NOT_VALUES)
    yield from _leaves(said)
    yield "the config", plan.config_text


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, str(value)


def _refusal(what: str, where: str, text: str, known: frozenset[str]) -> NemotronError:
    # The variable's name helps if its value is an ordinary word; the value must not be shown.
    names = [name for name, value in os.environ.items() if value in known and value in text]
    return NemotronError(
        "secret_in_job",
        f"{what} is a secret" + (f" ({names[0]})" if names else ""),
        where=where,
        why="the files of a job are written to disk and shown; secrets must not be",
        fix='name its variable in the profile instead: secrets = ["HF_TOKEN"]; '
        "the job reads it from its environment",
    )
