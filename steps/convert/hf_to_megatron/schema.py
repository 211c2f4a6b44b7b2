"""The config of ``convert/hf_to_megatron``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nemotron.config import Schema


class Config(Schema):
    """Config of ``convert/hf_to_megatron``."""

    hf_model_path: Path = Field(description="directory of the Hugging Face checkpoint")
    output_dir: Path = Field(description="directory of the Megatron checkpoint")
    trust_remote_code: Literal[False] = Field(
        default=False, description="code from a checkpoint is never run"
    )
