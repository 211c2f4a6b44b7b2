"""The config of ``convert/megatron_to_hf``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nemotron.config import Schema


class Config(Schema):
    """Config of ``convert/megatron_to_hf``."""

    megatron_path: Path = Field(
        description="Megatron checkpoint: its root or an iteration directory"
    )
    hf_model_path: Path | None = Field(
        default=None,
        description="directory that config, tokenizer and chat template come from; null: what the "
        "checkpoint carries",
    )
    output_dir: Path = Field(description="directory of the Hugging Face checkpoint")
    show_progress: bool = Field(default=True, description="print progress of long conversions")
    trust_remote_code: Literal[False] = Field(
        default=False, description="code from a checkpoint is never run"
    )
