"""Writes adapters as Megatron-Bridge saves them, for its ``LoRA`` or ``CanonicalLoRA`` to load.

Source: Megatron-Bridge 0.3 to 0.6 and of 2026-08, peft/{base,lora,canonical_lora}.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.steps._formats.lora import LoraAdapter, adapter_error
from nemotron.steps._formats.megatron_adapter import CANONICAL_PARTS, CANONICAL_TARGETS
from nemotron.steps._formats.megatron_files import run_config_sections, write_iteration_files
from nemotron.steps._formats.torch_dist_writer import TorchDistFile, torch_dist_writer
from nemotron.steps._models.layouts import join_lora_rows, lora_hf_modules
from nemotron.steps._models.targets import LINEARS

_BRIDGE_PEFT = "megatron.bridge.peft"
_KEEP = "keep it in PEFT's layout, which can be merged too: nemotron steps run convert/merge_lora"
Pair = tuple[Tensor, Tensor]


def write_megatron_adapter(
    root: Path, adapter: LoraAdapter, *, pretrained_checkpoint: str, iteration: int = 0
) -> str:
    """Write an adapter as a checkpoint of Megatron-Bridge; return ``LoRA`` or ``CanonicalLoRA``.

    It is ``LoRA`` if the parts of every fused linear share lora_a, as after training on fused
    linears, and ``CanonicalLoRA`` otherwise.

    Args:
        root: The directory to write to, which exists and is empty.
        adapter: The adapter to write.
        pretrained_checkpoint: Path of the Megatron base, for Megatron-Bridge's merge.
        iteration: Number of the save.

    Raises:
        NemotronError: ``adapter_config``: modules differ in rank or scale, or are adapted in some
            layers only, which this format does not express.
    """
    scale = _one_scale(adapter)
    linears = _adapted_linears(adapter)
    is_canonical = not all(_is_fused(adapter, linear) for linear in linears)
    iteration_dir = root / f"iter_{iteration:07d}"
    iteration_dir.mkdir()
    with torch_dist_writer(iteration_dir) as writer:
        for linear in linears:
            for part, layers in _parts(adapter, linear, is_canonical=is_canonical).items():
                _write_stacked(writer, part, layers)
    kind = "CanonicalLoRA" if is_canonical else "LoRA"
    dtype = adapter.read(adapter.modules[0])[0].dtype
    name = adapter.base_model_name_or_path or ""
    run_config = {
        **run_config_sections(source_name=name, pretrained_checkpoint=pretrained_checkpoint),
        "model": adapter.config.to_run_config(
            dtype_name=str(dtype).removeprefix("torch."), source_name=name
        ),
        "peft": _peft_section(adapter, linears, kind=kind, alpha=scale * adapter.dim),
    }
    write_iteration_files(root, iteration_dir, run_config, iteration=iteration)
    return kind


def _one_scale(adapter: LoraAdapter) -> float:
    scales = {adapter.scale(module) for module in adapter.modules}
    ranks = {len(adapter.read(module)[0]) for module in adapter.modules}
    if len(scales) > 1 or ranks != {adapter.dim}:
        problem = "its modules differ in rank or scale; Megatron-Bridge allows only one of each"
        raise adapter_error("config", adapter.directory, problem, fix=_KEEP)
    return scales.pop()


def _adapted_linears(adapter: LoraAdapter) -> list[str]:
    """Return the adapted linears, after checking that all layers adapt the same parts of them."""
    modules = set(adapter.modules)
    adapted = []
    for linear in LINEARS:
        names = _names(adapter, linear)
        found = {tuple(part in modules for part in lora_hf_modules(name)) for name in names}
        if len(found) > 1:
            problem = f"{linear} is adapted only in some layers; Megatron-Bridge stacks all layers"
            raise adapter_error("config", adapter.directory, problem, fix=_KEEP)
        adapted += [linear] if any(found.pop()) else []
    return adapted


def _names(adapter: LoraAdapter, linear: str) -> list[str]:
    layers = range(adapter.config.num_layers)
    return [f"decoder.layers.{layer}.{LINEARS[linear]}.{linear}" for layer in layers]


def _is_fused(adapter: LoraAdapter, linear: str) -> bool:
    modules = set(adapter.modules)
    for name in _names(adapter, linear):
        parts = lora_hf_modules(name)
        if not modules.issuperset(parts):
            return False
        first, *others = (adapter.read(part)[0] for part in parts)
        if not all(torch.equal(first, other) for other in others):
            return False
    return True


def _parts(adapter: LoraAdapter, linear: str, *, is_canonical: bool) -> dict[str, list[Pair]]:
    """Return the factors of every layer, by the key prefix that they are saved under."""
    names = _names(adapter, linear)
    prefix = f"decoder.layers.{LINEARS[linear]}.{linear}.adapter"
    if not is_canonical or linear not in CANONICAL_PARTS:
        pairs = [[adapter.read(part) for part in lora_hf_modules(name)] for name in names]
        return {
            prefix: [
                (own[0][0], join_lora_rows(name, [b for _, b in own], config=adapter.config))
                for name, own in zip(names, pairs, strict=True)
            ]
        }
    modules = set(adapter.modules)
    return {
        f"{prefix}.adapter_{part}": [adapter.read(lora_hf_modules(name)[index]) for name in names]
        for index, part in enumerate(CANONICAL_PARTS[linear])
        if lora_hf_modules(names[0])[index] in modules
    }


def _write_stacked(writer: TorchDistFile, key: str, layers: Sequence[Pair]) -> None:
    for layer, pair in enumerate(layers):
        for half, factor in zip(("in", "out"), pair, strict=True):
            writer.write(
                f"{key}.linear_{half}.weight",
                factor[None],
                offsets=(layer, 0, 0),
                global_shape=(len(layers), *factor.shape),
            )
            # Megatron-Bridge up to 0.4 asks for the (empty) state of every linear layer.
            writer.write_object(
                f"{key}.linear_{half}._extra_state/shard_{layer}_{len(layers)}", [None]
            )


def _peft_section(
    adapter: LoraAdapter, linears: Sequence[str], *, kind: str, alpha: float
) -> dict[str, Any]:
    module = {"LoRA": "lora.LoRA", "CanonicalLoRA": "canonical_lora.CanonicalLoRA"}[kind]
    targets = list(linears)
    if kind == "CanonicalLoRA":
        leaves = set(adapter.modules)
        targets = []
        for linear in linears:
            parts = CANONICAL_PARTS.get(linear)
            modules = lora_hf_modules(_names(adapter, linear)[0])
            if parts is None:
                targets.append(linear)
                continue
            targets += [
                CANONICAL_TARGETS[linear, part]
                for part, name in zip(parts, modules, strict=True)
                if name in leaves
            ]
    return {
        "_target_": f"{_BRIDGE_PEFT}.{module}",
        "alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "dim": adapter.dim,
        "dropout": adapter.dropout,
        "dropout_position": "pre",
        "exclude_modules": [],
        "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero",
        "target_modules": targets,
    }
