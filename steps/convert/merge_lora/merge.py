"""Merges an adapter into its base, writes the result and verifies it.

merged = W + scale * lora_b @ lora_a, with product and sum in fp32, cast once to the type of W.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.artifacts import Producer
from nemotron.steps._entry import step_error
from nemotron.steps._formats.huggingface_writer import publish_huggingface
from nemotron.steps._formats.lora import LoraAdapter
from nemotron.steps._formats.megatron_writer import publish_megatron
from nemotron.steps._formats.weights import Weights, all_finite, rows_of_a_block
from nemotron.steps._training.layerwise import compare_merged
from nemotron.steps.convert.merge_lora.checks import STEP
from nemotron.steps.convert.merge_lora.inputs import MergeInputs


class MergedWeights:
    """A base with an adapter added to it, one tensor at a time; see ``Weights``.

    Attributes:
        changes: Root mean square of the change by tensor, of the adapted tensors read so far.

    Raises:
        NemotronError: ``merged_not_finite``, where a tensor is read.
    """

    def __init__(self, base: Weights, adapter: LoraAdapter) -> None:
        self.config, self.names = base.config, base.names
        self.shape, self.dtype = base.shape, base.dtype
        self.changes: dict[str, float] = {}
        self._base = base
        self._adapter = adapter
        self._modules = frozenset(adapter.modules)

    def read(self, name: str) -> Tensor:
        return torch.cat([block.clone() for block in self.blocks(name)])

    def blocks(self, name: str) -> Iterator[Tensor]:
        blocks = self._base.blocks(name)
        module = name.removesuffix(".weight")
        if module in self._modules:
            lora_a, lora_b = self._adapter.read(module)
            scale = self._adapter.scale(module)
            dtype = self.dtype(name)
            blocks = add_delta(blocks, lora_a, lora_b, scale=scale, dtype=dtype)
            self.changes[name] = rms_change(lora_a, lora_b, scale=scale)
        for block in blocks:
            if not all_finite(block):
                problem = f"{name} has values that are not finite"
                raise step_error(STEP, "merged_not_finite", problem)
            yield block


def add_delta(
    blocks: Iterable[Tensor],
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield ``weight + scale * lora_b @ lora_a``, [F, H], in the weight's type, block by block.

    The weight is always merged in the same blocks of rows, whatever blocks it comes in: the last
    bits of a product may depend on the number of rows, and a merge must not depend on the base's
    format.

    Args:
        blocks: The weight, [F, H], in blocks of its rows.
        lora_a: [R, H].
        lora_b: [F, R].
        scale: Scale of the adapter in this module, such as alpha / dim.
        dtype: The weight's type.
    """
    lora_a, lora_b = lora_a.float(), lora_b.float()
    wide = torch.empty(rows_of_a_block(lora_a.shape[1]), lora_a.shape[1])
    merged = torch.empty_like(wide, dtype=dtype)
    start = 0
    for rows in _filled(wide, blocks):
        stop = start + len(rows)
        rows.addmm_(lora_b[start:stop], lora_a, alpha=scale)
        yield merged[: len(rows)].copy_(rows)
        start = stop


def _filled(wide: Tensor, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield ``wide`` each time it is full of the blocks' rows, and at the end its filled part."""
    num_filled = 0
    for block in blocks:
        for rows in block.split(len(wide)):
            count = min(len(rows), len(wide) - num_filled)
            wide[num_filled : num_filled + count] = rows[:count]
            num_filled += count
            if num_filled == len(wide):
                yield wide
                num_filled = len(rows) - count
                wide[:num_filled] = rows[count:]
    if num_filled:
        yield wide[:num_filled]


def rms_change(lora_a: Tensor, lora_b: Tensor, *, scale: float) -> float:
    """Return the root mean square of ``scale * lora_b @ lora_a``, without computing the product.

    The sum of its squares is the sum of the R^2 elements of ``(B^T B) * (A A^T)``.
    """
    lora_a, lora_b = lora_a.double(), lora_b.double()
    squares = (lora_b.T @ lora_b).mul_(lora_a @ lora_a.T).sum().clamp(min=0.0)
    return abs(scale) * math.sqrt(squares.item() / (len(lora_b) * lora_a.shape[1]))


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
    """Write the merged checkpoints; each is read back and compared before it gets its name.

    Args:
        inputs: From ``open_inputs``.
        output_hf_path: Hugging Face directory, or None.
        output_megatron_path: Megatron checkpoint, or None.
        has_tokenizer: Whether tokenizer and chat template go into ``output_hf_path``.
        show_progress: Print a line every few seconds.
        debug: Print the change of each adapted tensor.
        produced_by: Goes into ``artifact.json``.

    Raises:
        NemotronError: ``merged_not_finite``, ``merged_differs``, ``artifact_damaged``, and what
            ``publish`` raises.
    """
    merged = MergedWeights(inputs.base, inputs.adapter)
    verify = partial(_verify, inputs)
    if output_hf_path is not None:
        publish_huggingface(
            output_hf_path,
            merged,
            source=inputs.model_files,
            has_tokenizer=has_tokenizer,
            chat_template=inputs.chat_template,
            produced_by=produced_by,
            inputs=inputs.lineage,
            properties=partial(_describe_merge, inputs, merged),
            show_progress=show_progress,
            compare=verify,
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
            compare=verify,
        )
    _report(inputs, merged, debug=debug)
    for output in (output_hf_path, output_megatron_path):
        if output is not None:
            print(f"written and read back: {output}")


def _verify(inputs: MergeInputs, written: Weights) -> dict[str, Any]:
    """Compare the logits of base and adapter with those of what was written."""
    found = compare_merged(inputs.base, inputs.adapter, written)
    change, difference = found.largest_change, found.largest_difference
    if not found.is_equal:
        problem = (
            f"logits of the merged weights differ by {difference:.3e} from those of base and "
            f"adapter, and by {found.rounded_difference:.3e} if their sum is rounded the same way; "
            f"the tolerance is {found.tolerance:.3e}"
        )
        raise step_error(STEP, "merged_differs", problem)
    print(
        f"logits of base + adapter and of the merged weights differ by at most {difference:.3e} "
        f"({found.num_tokens} tokens; the adapter changes them by up to {change:.3e})"
    )
    if difference > change / 2:
        print(
            "warning: most of the adapter's effect is lost by rounding the merged weights to the "
            "base's type; serve base and adapter unmerged, or merge into a base of a wider type",
            file=sys.stderr,
        )
    return {"verified": asdict(found)}


def _describe_merge(inputs: MergeInputs, merged: MergedWeights) -> dict[str, Any]:
    return {
        "merged_from": {
            "base_fingerprint": inputs.base.fingerprint(),
            "dim": inputs.adapter.dim,
            "alpha": inputs.adapter.alpha,
            "use_rslora": inputs.adapter.use_rslora,
            "rank_pattern": dict(inputs.adapter.rank_pattern),
            "alpha_pattern": dict(inputs.adapter.alpha_pattern),
            "target_modules": list(inputs.adapter.target_modules),
            "largest_rms_change": max(merged.changes.values()),
        }
    }


def _report(inputs: MergeInputs, merged: MergedWeights, *, debug: bool) -> None:
    for name, change in merged.changes.items() if debug else ():
        print(f"{name}: root mean square change {change:.3e}")
    print(f"merged {inputs.adapter.directory} into {inputs.base_path}")
    print(
        f"{len(merged.changes)} of {len(merged.names)} tensors merged (r {inputs.adapter.dim}, "
        f"alpha {inputs.adapter.alpha:g}), root mean square change up to "
        f"{max(merged.changes.values()):.3e}"
    )
