"""Merging: base weights with an adapter added to them, written out and read back.

merged = W + scale * lora_b @ lora_a, product and sum in fp32, cast once to the type of W.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.artifacts import Producer, publish, write_artifact
from nemotron.steps._entry import step_error
from nemotron.steps._formats.adapter import Adapter
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import (
    CHAT_TEMPLATE,
    HuggingFaceCheckpoint,
    copy_model_files,
    model_properties,
)
from nemotron.steps._formats.huggingface_writer import write_weights
from nemotron.steps._formats.megatron_writer import publish_megatron
from nemotron.steps._formats.weights import ReportedWeights, Weights, damaged
from nemotron.steps.convert.merge_lora.checks import ID
from nemotron.steps.convert.merge_lora.inputs import MergeInputs

_ROWS_AT_A_TIME = 1024  # bounds the fp32 copies; 64 MB each at 16k columns


class MergedWeights:
    """A base with an adapter added to it, one tensor at a time; see ``Weights``.

    Attributes:
        deltas: Largest absolute change by tensor, of the adapted tensors read so far.
    """

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        self.config, self.names = base.config, base.names
        self.shape, self.dtype = base.shape, base.dtype
        self.deltas: dict[str, float] = {}
        self._base = base
        self._adapter = adapter
        self._modules = frozenset(adapter.modules)

    def read(self, name: str) -> Tensor:
        weight = self._base.read(name)
        module = name.removesuffix(".weight")
        if module in self._modules:
            lora_a, lora_b = self._adapter.read(module)
            scale = self._adapter.scale(module)
            weight, self.deltas[name] = add_delta(weight, lora_a, lora_b, scale=scale)
        if not torch.isfinite(weight).all():
            raise step_error(ID, "merged_not_finite", f"{name} holds values that are not finite")
        return weight


def add_delta(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float
) -> tuple[Tensor, float]:
    """Return ``weight + scale * lora_b @ lora_a`` in its type, and the largest change.

    Args:
        weight: [F, H].
        lora_a: [R, H].
        lora_b: [F, R].
        scale: Of the adapter in this module, such as alpha / dim.

    Returns:
        The merged weight, and the largest absolute value of the scaled product before the cast.
    """
    merged = torch.empty_like(weight)
    largest = 0.0
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        delta = scale * (lora_b[rows].float() @ lora_a.float())
        merged[rows] = (weight[rows].float() + delta).to(weight.dtype)
        largest = max(largest, delta.abs().max().item())
    return merged, largest


def publish_merged(
    inputs: MergeInputs,
    *,
    output_hf_path: Path | None,
    output_megatron_path: Path | None,
    has_tokenizer: bool,
    show_progress: bool,
    debug: bool,
    produced_by: Producer,
) -> None:
    """Write the merged checkpoints, each read back before it gets its name.

    Args:
        inputs: From ``open_inputs``.
        output_hf_path: Hugging Face directory, or None.
        output_megatron_path: Megatron checkpoint, or None.
        has_tokenizer: Whether tokenizer and chat template go into ``output_hf_path``.
        show_progress: Print a line every few seconds.
        debug: Print the largest change of each adapted tensor.
        produced_by: Goes into ``artifact.json``.

    Raises:
        NemotronError: ``merged_not_finite``, ``artifact_damaged``, and what ``publish`` raises.
    """
    merged = MergedWeights(inputs.base, inputs.adapter)
    if output_hf_path is not None:
        with publish(output_hf_path) as directory:
            weights = ReportedWeights(merged, "merging") if show_progress else merged
            properties = _write_hf(directory, inputs, weights, has_tokenizer=has_tokenizer)
            properties |= _describe_merge(inputs, merged)
            write_artifact(
                directory,
                artifact_type="checkpoint_hf",
                produced_by=produced_by,
                inputs=inputs.lineage,
                properties=properties,
            )
    if output_megatron_path is not None:
        publish_megatron(
            output_megatron_path,
            merged,
            source=inputs.model_files,
            source_name=str(inputs.model_files.resolve()),
            produced_by=produced_by,
            inputs=inputs.lineage,
            show_progress=show_progress,
        )
    _report(inputs, merged, debug=debug)
    for output in (output_hf_path, output_megatron_path):
        if output is not None:
            print(f"written and read back: {output}")


def _write_hf(
    directory: Path, inputs: MergeInputs, weights: Weights, *, has_tokenizer: bool
) -> dict[str, Any]:
    """Write a complete Hugging Face directory, read it back, and return the model's properties."""
    copy_model_files(inputs.model_files, directory, has_tokenizer=has_tokenizer)
    if has_tokenizer and inputs.chat_template is not None:
        (directory / CHAT_TEMPLATE).write_text(inputs.chat_template, encoding="utf-8")
    fingerprint = write_weights(directory, weights)
    if base_fingerprint(HuggingFaceCheckpoint(directory)) != fingerprint:
        raise damaged(directory, "the weights read back are not those that were written")
    return model_properties(inputs.model_files, weights.config, fingerprint)


def _describe_merge(inputs: MergeInputs, merged: MergedWeights) -> dict[str, Any]:
    return {
        "merged_from": {
            "base_fingerprint": inputs.base_fingerprint,
            "dim": inputs.adapter.dim,
            "alpha": inputs.adapter.alpha,
            "use_rslora": inputs.adapter.use_rslora,
            "rank_pattern": dict(inputs.adapter.rank_pattern),
            "alpha_pattern": dict(inputs.adapter.alpha_pattern),
            "target_modules": list(inputs.adapter.target_modules),
            "largest_change": max(merged.deltas.values()),
        }
    }


def _report(inputs: MergeInputs, merged: MergedWeights, *, debug: bool) -> None:
    for name, delta in merged.deltas.items() if debug else ():
        print(f"{name}: largest change {delta:.3e}")
    print(
        f"{len(merged.deltas)} of {len(merged.names)} tensors merged (r {inputs.adapter.dim}, "
        f"alpha {inputs.adapter.alpha:g}), largest change {max(merged.deltas.values()):.3e}"
    )
