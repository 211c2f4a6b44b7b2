"""Which conversations a run reads: one path, or a blend file that names several data sets.

The launcher's checks import this module, so it stays light.
"""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error

STEP = "data_prep/sft_packing"
HUB = "hf://"
# A blend names files and holds no conversations: a larger .json is data.
MAX_BLEND_BYTES = 1 << 20
CONVERSATION_FIELDS = ("messages", "conversations", "instruction", "prompt")

WeightBy = Literal["rows", "tokens"]


class Dataset(BaseModel):
    """One source of a blend.

    Attributes:
        name: Name in reports; must be unique.
        path: File, directory or glob, relative to the blend file, or ``hf://owner/name``.
        weight: Relative share of the blend; 0 leaves the source out.
        max_rows: At most this many conversations, chosen by hash before they are rendered. A larger
            number chooses a superset; fewer are left if some cannot be rendered.
        repeat: How often the training split has it; 1.5 repeats half of it, chosen by hash.
        messages_field: Field of a conversation.
        tools_field: Field of the tool definitions.
        subset: Of a data set on the hub, only the files of this subset.
        split: Of a data set on the hub, only the files of this split.
        into: The split of the output that takes all of it; None where ratios decide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    max_rows: int | None = Field(default=None, ge=1)
    repeat: float = Field(default=1.0, ge=1, le=1000)
    messages_field: str = "messages"
    tools_field: str = "tools"
    subset: str | None = None
    split: str | None = None
    into: Literal["train", "valid", "test"] | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        is_hub = self.path.startswith(HUB)
        if "://" in self.path and not is_hub:
            raise ValueError(f"{self.path} is neither a local path nor {HUB}...")
        if not is_hub and (self.split or self.subset):
            raise ValueError(
                "split and subset select files of a data set on the hub; to give one split of the "
                "output its own data, list it under train, valid or test instead of datasets"
            )
        return self


class Blend(BaseModel):
    """The content of a blend file: ``datasets``, or one list for each split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: tuple[Dataset, ...] = ()
    train: tuple[Dataset, ...] = ()
    valid: tuple[Dataset, ...] = ()
    test: tuple[Dataset, ...] = ()
    weight_by: WeightBy = "rows"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.datasets) == any((self.train, self.valid, self.test)):
            raise ValueError("wanted either datasets, or lists named train, valid and test")
        if not self.datasets and not self.train:
            raise ValueError("train is empty")
        names = [dataset.name for dataset in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two datasets have the name {twice[0]!r}")
        if not any(dataset.weight for dataset in self.datasets or self.train):
            raise ValueError("every dataset has weight 0")
        return self

    @property
    def sources(self) -> tuple[Dataset, ...]:
        """All data sets, those of a per-split list with their split in ``into``."""
        lists: dict[Literal["train", "valid", "test"], tuple[Dataset, ...]] = {
            "train": self.train,
            "valid": self.valid,
            "test": self.test,
        }
        own = (
            dataset.model_copy(update={"into": split})
            for split, datasets in lists.items()
            for dataset in datasets
        )
        return self.datasets or tuple(own)


@dataclass(frozen=True)
class Sources:
    """The data sets of a run, and what their weights count."""

    datasets: tuple[Dataset, ...]
    weight_by: WeightBy = "rows"


def read_blend(
    blend_path: str, *, messages_field: str, tools_field: str, max_rows: int | None
) -> Sources:
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
            return Sources((alone.model_copy(update=defaults),))
        blend = Blend.model_validate(content)
    except ValidationError as error:
        raise _bad_blend(path, error) from None
    return Sources(
        tuple(
            dataset.model_copy(
                update={
                    name: value
                    for name, value in defaults.items()
                    if name not in dataset.model_fields_set
                }
                | {"path": _resolved(dataset.path, path.parent)}
            )
            for dataset in blend.sources
        ),
        blend.weight_by,
    )


def _resolved(path: str, directory: Path) -> str:
    if path.startswith(HUB):
        return path
    if glob.has_magic(path) and not (directory / path).exists():
        return str(Path(glob.escape(str(directory))) / path)
    return str(directory / path)


def _blend_content(path: Path, messages_field: str) -> dict[str, Any] | None:
    """Return the object that a blend file holds, or None where ``path`` is data.

    Both may be called ``.json``. A single object without a conversation is a blend, so that a
    misspelt ``datasets`` is an error in the blend, and not a data set of one strange row.
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
    else:
        said = first["msg"].removeprefix("Value error, ")
        problem = f"{place}: {said}" if place else said
    return step_error(STEP, "bad_blend", problem, where=str(path))
