"""The configs that the launcher passes to the commands of ``nemotron adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nemotron.config import Schema


class VerifyConfig(Schema):
    """Config of ``nemotron adapter verify``."""

    adapter: Path = Field(
        description="PEFT adapter, Megatron-Bridge adapter checkpoint, or output root of either"
    )
    base: Path | None = Field(
        default=None, description="base; null: the one that the adapter records"
    )
    as_json: bool = Field(default=False, description="print JSON")


class DiffConfig(VerifyConfig):
    """Config of ``nemotron adapter diff``."""

    other: Path = Field(description="the adapter to compare with")


class ExportConfig(VerifyConfig):
    """Config of ``nemotron adapter export``."""

    output: Path = Field(description="directory to write")
    layout: Literal["peft", "megatron_bridge"] = Field(description="layout to write")
