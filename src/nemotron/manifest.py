"""A step's description of itself: ``step.toml`` as frozen models, all fields checked here, once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nemotron.artifacts import load_types
from nemotron.errors import ExitCode, NemotronError
from nemotron.tree import display, from_plain
from nemotron.validation import did_you_mean, validate

FILE_NAME = "step.toml"
_ID = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepInfo(_Frozen):
    """The table ``[step]``: what the step is, how it starts, what it needs on a cluster."""

    id: str
    name: str
    category: str
    description: str
    tags: tuple[str, ...] = ()
    launch: Literal["torchrun", "python"]
    image: str | None = None
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    shares_work: bool = False  # with launch = "python": it can run on several nodes at once

    @model_validator(mode="after")
    def _id_in_category(self) -> Self:
        if not _ID.fullmatch(self.id) or self.id.split("/")[0] != self.category:
            raise ValueError(f"id {self.id!r} is not {self.category}/<name> in a-z, 0-9 and _")
        return self


class DeclaredArtifact(_Frozen):
    """An artifact that a step reads or writes, and the config keys that may hold its path."""

    type: str
    required: bool = True
    description: str = ""
    keys: tuple[str, ...] = ()


class Consumed(DeclaredArtifact):
    """An input; ``missing`` names the entry of ``[[errors]]`` for an input that does not exist."""

    missing: str | None = None


class Parameter(_Frozen):
    """A config key that the step's reference page explains."""

    name: str
    description: str
    default: Any = None
    choices: tuple[Any, ...] = ()


class Strategy(_Frozen):
    """Advice: in the situation ``when``, do ``then``."""

    when: str
    then: str


class ErrorEntry(_Frozen):
    """An error that the step raises by name, with its cause, recovery and exit code."""

    name: str
    cause: str
    recovery: str
    exit_code: ExitCode


class Manifest(_Frozen):
    """A whole ``step.toml``."""

    step: StepInfo
    consumes: tuple[Consumed, ...] = ()
    produces: tuple[DeclaredArtifact, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    strategies: tuple[Strategy, ...] = ()
    errors: tuple[ErrorEntry, ...] = ()
    reference: dict[str, str | list[str]] = {}

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        types = load_types()
        for artifact in (*self.consumes, *self.produces):
            if artifact.type not in types:
                hint = did_you_mean(artifact.type, types, "see types.toml")
                raise ValueError(f"artifact type {artifact.type!r} is not in types.toml; {hint}")
        names = [entry.name for entry in self.errors]
        if len(set(names)) < len(names):
            raise ValueError("two [[errors]] have the same name")
        for consumed in self.consumes:
            if consumed.missing is not None and consumed.missing not in names:
                raise ValueError(f"missing = {consumed.missing!r} is not one of [[errors]]")
        return self

    def error(self, name: str, problem: str, *, where: str = "") -> NemotronError | None:
        """Return the error ``name`` of this manifest about ``problem``, or None."""
        for entry in self.errors:
            if entry.name == name:
                return NemotronError(
                    name,
                    problem,
                    where=where,
                    why=entry.cause,
                    fix=entry.recovery,
                    exit_code=entry.exit_code,
                )
        return None


def read_manifest(path: Path) -> Manifest:
    """Return the manifest in a ``step.toml``.

    Raises:
        NemotronError: ``manifest_invalid`` (not TOML), ``unknown_key``, ``invalid_value``; with the
            file and the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NemotronError(
            "manifest_invalid",
            f"{display(path)} is not TOML: {error}",
            where=display(path),
            fix="correct the file",
        ) from None
    return validate(from_plain(table, display(path)), Manifest, what="manifest key")
