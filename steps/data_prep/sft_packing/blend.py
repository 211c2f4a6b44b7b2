"""Which conversations a run reads: one path, or a blend file that names several data sets.

The launcher's checks import this module, so it stays light.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error

STEP = "data_prep/sft_packing"
# A blend names files, it holds no conversations: a larger .json is data.
MAX_BLEND_BYTES = 1 << 20
CONVERSATION_FIELDS = ("messages", "conversations", "instruction")


class Dataset(BaseModel):
    """One source of a blend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_rows: int | None = Field(default=None, ge=1)
    messages_field: str = "messages"
    tools_field: str = "tools"

    @field_validator("path")
    @classmethod
    def _is_local(cls, path: str) -> str:
        if "://" in path:
            raise ValueError(f"{path} is not local; this step reads local files only")
        return path


class Blend(BaseModel):
    """The content of a blend file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: tuple[Dataset, ...] = Field(min_length=1)

    @field_validator("datasets")
    @classmethod
    def _names_differ(cls, datasets: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
        names = [dataset.name for dataset in datasets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two datasets have the name {twice[0]!r}")
        if not any(dataset.weight for dataset in datasets):
            raise ValueError("every dataset has weight 0")
        return datasets


def read_blend(
    blend_path: str, *, messages_field: str, tools_field: str, max_rows: int | None
) -> tuple[Dataset, ...]:
    """Return the data sets that ``blend_path`` stands for.

    Paths inside a blend file are relative to its directory. A path that is no blend file is one
    data set, named after the file. The other arguments stand where a data set does not say.

    Raises:
        NemotronError: ``bad_blend``, naming the entry.
    """
    path = Path(blend_path)
    content = _blend_content(path, messages_field)
    defaults = {
        "messages_field": messages_field,
        "tools_field": tools_field,
        "max_rows": max_rows,
    }
    try:
        if content is None:
            alone = Dataset(name=path.stem or blend_path, path=blend_path)
            return (alone.model_copy(update=defaults),)
        blend = Blend.model_validate(content)
    except ValidationError as error:
        raise _bad_blend(path, error) from None
    return tuple(
        Dataset.model_validate(
            defaults
            | dataset.model_dump(exclude_unset=True)
            | {"path": str(path.parent / dataset.path)}
        )
        for dataset in blend.datasets
    )


def _blend_content(path: Path, messages_field: str) -> dict[str, Any] | None:
    """Return the object that a blend file holds, or None where ``path`` is data.

    Both may be called ``.json``. One object that carries no conversation is a blend, so that a
    misspelt ``datasets`` is an error in the blend and not a data set of one strange row.
    """
    if path.suffix != ".json" or not path.is_file() or path.stat().st_size > MAX_BLEND_BYTES:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(content, dict) and {*CONVERSATION_FIELDS, messages_field} & content.keys()
    return None if is_row or not isinstance(content, dict) else content


def _bad_blend(path: Path, error: ValidationError) -> NemotronError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        problem = f"unknown key {place!r}"
        if first["loc"][0] in ("train", "valid", "test"):
            problem += "; splits are made by ratio, from one list called datasets"
    else:
        problem = f"{place}: {first['msg'].removeprefix('Value error, ')}"
    return step_error(STEP, "bad_blend", problem, where=str(path))
