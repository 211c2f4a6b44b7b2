"""``nemotron adapter export``: writes an adapter in another layout, and reads it back."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from nemotron.artifacts import Producer, publish, refuse_overlap, write_artifact
from nemotron.steps._adapter.opening import OpenedAdapter, open_with_base
from nemotron.steps._adapter.schema import ExportConfig
from nemotron.steps._entry import run_step
from nemotron.steps._formats.adapter import write_peft
from nemotron.steps._formats.any_adapter import find_any_adapter, open_any_adapter
from nemotron.steps._formats.huggingface import TOKENIZER_FILES, copy_files
from nemotron.steps._formats.lora import LoraAdapter
from nemotron.steps._formats.megatron_adapter_writer import write_megatron_adapter
from nemotron.steps._formats.weights import damaged
from nemotron.steps._models.layouts import LORA_TARGETS


def run(config: ExportConfig, producer: Producer) -> None:
    """Write an adapter in another layout."""
    opened = open_with_base(config.adapter, base=config.base, base_digests=False)
    source = opened.adapter.directory
    refuse_overlap(config.output, {"adapter": source, "base": opened.base_path})
    with publish(config.output, step=producer.step) as partial:
        kind = _write(partial, opened, config.layout)
        _read_back(partial, opened)
        write_artifact(
            partial,
            artifact_type="checkpoint_lora",
            produced_by=producer,
            inputs=opened.lineage,
            properties=opened.recorded,
        )
    found = {"output": str(config.output), "layout": config.layout, "kind": kind}
    text = f"{source} -> {config.output} ({kind})"
    print(json.dumps(found, indent=2) if config.as_json else text)


def _write(partial: Path, opened: OpenedAdapter, layout: str) -> str:
    iteration = int(opened.recorded.get("iteration") or 0)
    if layout == "megatron_bridge":
        base = str(opened.base_path.resolve())
        kind = write_megatron_adapter(
            partial, opened.adapter, pretrained_checkpoint=base, iteration=iteration
        )
        if kind == "CanonicalLoRA" and _adapts_linear_fc1(opened):
            print(
                "warning: load it at tensor-parallel size 1; at any other, Megatron-Bridge "
                "silently reads the rows of linear_fc1's factors in a different order",
                file=sys.stderr,
            )
        return f"Megatron-Bridge's {kind}"
    write_peft(partial, opened.adapter)
    copy_files(opened.adapter.directory, partial, TOKENIZER_FILES)
    return "PEFT's LoRA"


def _adapts_linear_fc1(opened: OpenedAdapter) -> bool:
    leaves = {module.rsplit(".", 1)[-1] for module in opened.adapter.modules}
    return not leaves.isdisjoint(LORA_TARGETS["linear_fc1"])


def _read_back(partial: Path, opened: OpenedAdapter) -> None:
    directory = find_any_adapter(partial)
    assert directory is not None  # just written
    if not _is_same(opened.adapter, open_any_adapter(directory, config=opened.base.config)):
        raise damaged(partial, "the adapter read back differs from the one written")


def _is_same(one: LoraAdapter, other: LoraAdapter) -> bool:
    """Return whether two adapters have the same factors, and the same scales but for rounding.

    Megatron-Bridge has no rsLoRA: its alpha is the scale times the rank, by which it divides again.
    """
    return set(one.modules) == set(other.modules) and all(
        all(map(torch.equal, one.read(module), other.read(module)))
        and math.isclose(one.scale(module), other.scale(module), rel_tol=1e-12)
        for module in one.modules
    )


if __name__ == "__main__":
    raise SystemExit(run_step("adapter export", ExportConfig, run))
