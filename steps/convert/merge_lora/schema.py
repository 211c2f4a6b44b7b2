"""The config of ``convert/merge_lora``.

Keys of upstream's step that mean nothing to a merge that streams tensors on the CPU are accepted
with the one value that is true of it, so that its configs keep working and none is misled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nemotron.config import Schema

Backend = Literal["auto", "hf_peft", "megatron_bridge"]


class Config(Schema):
    """Config of ``convert/merge_lora``."""

    backend: Backend = Field(
        default="auto", description="auto: megatron_bridge if base_megatron_path is set"
    )
    lora_checkpoint: Path = Field(
        description="adapter directory, iter_NNNNNNN directory, or the trainer's output root"
    )
    base_hf_path: Path | None = Field(default=None, description="base, Hugging Face directory")
    base_megatron_path: Path | None = Field(default=None, description="base, Megatron checkpoint")
    hf_model_id: None = Field(
        default=None,
        description="models are not downloaded by hub id; pass hf_model_path or base_hf_path",
    )
    hf_model_path: Path | None = Field(
        default=None,
        description="directory of config, tokenizer and chat template; null: those of the base",
    )
    output_hf_path: Path | None = Field(
        default=None, description="merged Hugging Face checkpoint, written if export_hf is true"
    )
    output_megatron_path: Path | None = Field(
        default=None, description="merged Megatron checkpoint; null: none is written"
    )
    export_hf: bool = Field(default=True, description="write output_hf_path")
    save_tokenizer: bool = Field(
        default=True, description="copy tokenizer and chat template to output_hf_path"
    )
    allow_unverified_base: bool = Field(
        default=False, description="merge an adapter that does not record its base"
    )
    allow_unvalidated: bool = Field(
        default=False, description="merge an adapter without a held-out loss"
    )
    show_progress: bool = Field(default=True, description="print progress of long merges")
    debug: bool = Field(default=False, description="print the change of each tensor")

    trust_remote_code: Literal[False] = Field(
        default=False, description="code from a checkpoint is never run"
    )
    strict: Literal[True] = Field(
        default=True, description="missing and unexpected tensors are always refused"
    )
    safe_serialization: Literal[True] = Field(default=True, description="safetensors only")
    torch_dtype: Literal["auto"] = Field(default="auto", description="the type of the base")
    low_cpu_mem_usage: Literal[True] = Field(default=True, description="one tensor at a time")
    device_map: None = Field(default=None, description="the merge runs on the CPU")
    cpu: Literal[True] = Field(default=True, description="the merge runs on the CPU")
    tp: Literal[1] = 1
    pp: Literal[1] = 1
    ep: Literal[1] = 1
    nproc_per_node: Literal[1] = 1
    upstream_script: str | None = Field(
        default=None, description="has no effect: this step does the merge itself"
    )

    @property
    def is_megatron_base(self) -> bool:
        """Whether the base is read from ``base_megatron_path``."""
        if self.backend == "auto":
            return self.base_megatron_path is not None
        return self.backend == "megatron_bridge"

    @property
    def model_files(self) -> Path | None:
        """Where config and tokenizer come from, if the config says so."""
        return self.hf_model_path or self.base_hf_path
