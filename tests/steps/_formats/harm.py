"""Ten ways to harm an adapter directory, each with the code of the error it must end in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron.artifacts import read_artifact, write_artifact

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def wrong_prefix(directory: Path) -> None:
    _change(directory, lambda tensors: {k.removeprefix(PREFIX): v for k, v in tensors.items()})


def missing_half(directory: Path) -> None:
    _change(directory, lambda tensors: {k: v for k, v in tensors.items() if "lora_B" not in k})


def extra_keys(directory: Path) -> None:
    extra = f"{PREFIX}model.layers.99.self_attn.q_proj.lora_A.weight"
    _change(directory, lambda tensors: {**tensors, extra: torch.zeros(3, 16)})


def not_finite(directory: Path) -> None:
    name = f"{Q_PROJ}.lora_B.weight"
    _change(directory, lambda tensors: {**tensors, name: tensors[name] * float("nan")})


def changed_alpha(directory: Path) -> None:
    _configure(directory, lora_alpha=77)


def changed_base(directory: Path) -> None:
    _configure(directory, init_lora_weights="pissa_niter_16")


def wrong_rank(directory: Path) -> None:
    _configure(directory, r=77)


def wrong_shape(directory: Path) -> None:
    name = f"{Q_PROJ}.lora_B.weight"
    _change(directory, lambda tensors: {**tensors, name: tensors[name].T.contiguous()})


def truncated_file(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-5])


def other_base(directory: Path) -> None:
    resign(directory, base_fingerprint="0" * 64)


HARMS: dict[Callable[[Path], None], str] = {
    wrong_prefix: "adapter_prefix",
    missing_half: "adapter_half_missing",
    extra_keys: "adapter_keys_unexpected",
    not_finite: "adapter_not_finite",
    changed_alpha: "adapter_alpha",
    changed_base: "adapter_config",
    wrong_rank: "adapter_rank",
    wrong_shape: "adapter_shape",
    truncated_file: "artifact_damaged",
    other_base: "base_model_mismatch",
}


def resign(directory: Path, **properties: Any) -> None:
    """Write ``artifact.json`` anew over changed files, as a careless tool might."""
    artifact = read_artifact(directory, "checkpoint_lora")
    (directory / "artifact.json").unlink()
    write_artifact(
        directory,
        artifact_type="checkpoint_lora",
        produced_by=artifact.produced_by,
        properties=artifact.properties | properties,
    )


def _change(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata=metadata)


def _configure(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(values), encoding="utf-8")
