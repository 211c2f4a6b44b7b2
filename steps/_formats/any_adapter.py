"""Adapters of either format: PEFT's directories and Megatron-Bridge's checkpoints."""

from __future__ import annotations

from pathlib import Path

from nemotron.artifacts import MANIFEST, Artifact, read_artifact, verify_files
from nemotron.steps._formats.adapter import ADAPTER_CONFIG, find_adapter_dir, open_adapter
from nemotron.steps._formats.lora import LoraAdapter
from nemotron.steps._formats.megatron import find_iteration_dir
from nemotron.steps._formats.megatron_adapter import is_megatron_adapter, open_megatron_adapter
from nemotron.steps._models.config import DecoderConfig


def find_any_adapter(path: Path) -> Path | None:
    """Return the directory of the adapter at ``path``, or the one that its trackers name, or None.

    Raises:
        NemotronError: ``checkpoint_missing`` or ``artifact_damaged``, of a tracker.
    """
    found = find_adapter_dir(path)
    if found is None and is_megatron_adapter(path):
        return find_iteration_dir(path)
    return found


def read_adapter_record(directory: Path) -> Artifact | None:
    """Return the ``artifact.json`` of an adapter, its files verified; None if it has none.

    In a checkpoint of Megatron-Bridge it is in the root, above the iteration's directory.

    Raises:
        NemotronError: ``artifact_damaged`` or ``artifact_type``.
    """
    is_peft = (directory / ADAPTER_CONFIG).is_file()
    for root in (directory,) if is_peft else (directory, directory.parent):
        if (root / MANIFEST).is_file():
            artifact = read_artifact(root, "checkpoint_lora")
            verify_files(root, artifact)
            return artifact
    return None


def open_any_adapter(directory: Path, *, config: DecoderConfig) -> LoraAdapter:
    """Return the adapter in a directory that ``find_any_adapter`` found, checked; see there."""
    if (directory / ADAPTER_CONFIG).is_file():
        return open_adapter(directory, config=config)
    return open_megatron_adapter(directory, config=config)
