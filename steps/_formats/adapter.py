"""LoRA adapters in PEFT's own layout: written from Megatron's factors, read with strict checks.

An adapter is ``adapter_config.json`` and ``adapter_model.safetensors`` with Hugging Face names, so
that PEFT loads the directory as it is. A fused Megatron module becomes one module per part, which
repeats ``lora_A`` and has its own rows of ``lora_B``. Reading refuses anything that would make the
adapter do less than its config says, or something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron.steps._formats.adapter_checks import (
    ADAPTER_CONFIG,
    PREFIX,
    SCALING,
    by_pattern,
    check_config,
    check_keys,
    check_pattern,
    check_scaling,
    check_shape,
    tensor_names,
    wanted_shapes,
)
from nemotron.steps._formats.adapter_targets import adapted_modules
from nemotron.steps._formats.lora import LoraAdapter, adapter_error
from nemotron.steps._formats.megatron import TRACKER
from nemotron.steps._formats.safetensors_file import SafetensorsFile, write_safetensors
from nemotron.steps._formats.weights import all_finite, pickled_weights, read_json
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import (
    lora_from_hf,
    lora_hf_modules,
    lora_to_hf,
)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_CONVERT_PICKLED = (
    "import sys, pathlib, shutil, torch; from safetensors.torch import save_file; "
    "source, target = map(pathlib.Path, sys.argv[1:]); target.mkdir(); "
    f"save_file(torch.load(source / '{_PICKLED}', weights_only=True), "
    f"target / '{ADAPTER_WEIGHTS}'); "
    f"shutil.copy(source / '{ADAPTER_CONFIG}', target)"
)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter directory; factors are read when they are asked for.

    Args:
        directory: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: Sizes of the model it adapts.
        dim: LoRA rank of the modules that ``rank_pattern`` does not name.
        alpha: LoRA alpha of the modules that ``alpha_pattern`` does not name.
        dropout: Dropout it was trained with.
        use_rslora: Whether the scale is ``alpha / sqrt(dim)`` instead of ``alpha / dim``.
        rank_pattern: LoRA rank by PEFT's patterns: regular expressions for the end of a module.
        alpha_pattern: LoRA alpha likewise.
        base_model_name_or_path: What it says it was trained on.
        file: The opened weights.
    """

    directory: Path
    config: DecoderConfig
    dim: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model_name_or_path: str | None
    file: SafetensorsFile

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Hugging Face names of the adapted modules or their last parts, sorted."""
        return tuple(_target_modules(self.modules, self.config))

    def scale(self, module: str) -> float:
        """Return what the product of the factors of one of ``modules`` is multiplied by."""
        dim = by_pattern(self.rank_pattern, module, default=self.dim)
        alpha = by_pattern(self.alpha_pattern, module, default=self.alpha)
        return alpha / (math.sqrt(dim) if self.use_rslora else dim)

    @property
    def modules(self) -> tuple[str, ...]:
        """Adapted Hugging Face modules, such as ``model.layers.0.self_attn.q_proj``."""
        end = ".lora_A.weight"
        names = (name for name in self.file.entries if name.endswith(end))
        return tuple(name.removeprefix(PREFIX).removesuffix(end) for name in names)

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """Return lora_a [R, in features] and lora_b [out features, R] of one of ``modules``."""
        lora_a, lora_b = (self.file.read(name) for name in tensor_names(module))
        return lora_a, lora_b

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (lora_a, lora_b) by Megatron module, all at once.

        Raises:
            NemotronError: ``adapter_not_fused``, see ``lora_from_hf``.
        """
        tensors = {name: self.file.read(name) for name in self.file.entries}
        return lora_from_hf(tensors, self.config)


def write_adapter(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    config: DecoderConfig,
    dim: int,
    alpha: float,
    dropout: float,
    base_model_name_or_path: str,
    use_rslora: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> None:
    """Write an adapter as PEFT does, in the type that the factors have.

    ``adapter_config.json`` names exactly the modules of ``factors``: a name's last part where
    every layer has that module, the full name otherwise. PEFT reads ``rank_pattern`` and
    ``alpha_pattern``; vLLM does not, and silently scales such an adapter wrongly: merge it instead.

    Args:
        directory: Where to write; exists.
        factors: lora_a [R, in features] and lora_b [out features, R], whole, by Megatron module
            (``decoder.layers.3.self_attention.linear_qkv``); R may differ between modules.
        config: Sizes of the model.
        dim: LoRA rank of most modules.
        alpha: LoRA alpha of most modules.
        dropout: Dropout of the adapter's input, in [0, 1).
        base_model_name_or_path: The base, for PEFT's ``AutoPeftModel``.
        use_rslora: Whether the scale is ``alpha / sqrt(dim)`` instead of ``alpha / dim``.
        alphas: LoRA alpha by Megatron module, of those that have another than ``alpha``.
    """
    tensors: dict[str, Tensor] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    adapted: list[str] = []
    for name, (lora_a, lora_b) in factors.items():
        tensors |= lora_to_hf(name, lora_a.detach().cpu(), lora_b.detach().cpu(), config)
        modules = lora_hf_modules(name)
        adapted += modules
        rank_pattern |= {module: len(lora_a) for module in modules if len(lora_a) != dim}
        own_alpha = (alphas or {}).get(name, alpha)
        alpha_pattern |= {module: _number(own_alpha) for module in modules if own_alpha != alpha}
    _write_files(
        directory,
        tensors,
        _scaling(dim, alpha, use_rslora, rank_pattern, alpha_pattern),
        dropout=dropout,
        base_model_name_or_path=base_model_name_or_path,
        target_modules=_target_modules(adapted, config),
    )


def write_peft(directory: Path, adapter: LoraAdapter) -> None:
    """Write any adapter as PEFT does, its factors unchanged, into a directory that exists."""
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        tensors |= dict(zip(tensor_names(module), adapter.read(module), strict=True))
    _write_files(
        directory,
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        _scaling(
            adapter.dim,
            adapter.alpha,
            adapter.use_rslora,
            adapter.rank_pattern,
            adapter.alpha_pattern,
        ),
        dropout=adapter.dropout,
        base_model_name_or_path=adapter.base_model_name_or_path or "",
        target_modules=_target_modules(adapter.modules, adapter.config),
    )


def _scaling(
    dim: int,
    alpha: float,
    use_rslora: bool,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    """Return the fields of the config that the factors' product is scaled by, in PEFT's names."""
    return {
        "r": dim,
        "lora_alpha": _number(alpha),
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
    }


def _write_files(
    directory: Path,
    tensors: Mapping[str, Tensor],
    scaling: Mapping[str, Any],
    *,
    dropout: float,
    base_model_name_or_path: str,
    target_modules: list[str],
) -> None:
    write_safetensors(
        directory / ADAPTER_WEIGHTS,
        names=sorted(tensors),
        shape=lambda name: tuple(tensors[name].shape),
        dtype=lambda name: tensors[name].dtype,
        blocks=lambda name: [tensors[name]],
        metadata={SCALING: json.dumps(scaling)},
    )
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "target_modules": target_modules,
        "use_dora": False,
        **scaling,
    }
    text = json.dumps(values, indent=2) + "\n"
    (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def open_adapter(directory: Path, *, config: DecoderConfig) -> Adapter:
    """Return the adapter in ``directory`` after checking it against the model it is to adapt.

    The checks cover every field of the config that changes what an adapter does, the exact set of
    tensors, their shapes, the rank, and that all values are finite.

    Raises:
        NemotronError: ``adapter_missing``, ``pickled_weights``, ``artifact_damaged``,
            ``adapter_config``, ``adapter_prefix``, ``adapter_half_missing``,
            ``adapter_keys_missing``, ``adapter_keys_unexpected``, ``adapter_rank``,
            ``adapter_alpha``, ``adapter_shape`` or ``adapter_not_finite``.
    """
    path = directory / ADAPTER_CONFIG
    _require_files(directory)
    values = read_json(path)
    dim, alpha = check_config(path, values)
    modules = adapted_modules(path, values, config)
    rank_pattern = check_pattern(path, values, "rank_pattern")
    alpha_pattern = check_pattern(path, values, "alpha_pattern")
    file = SafetensorsFile(directory / ADAPTER_WEIGHTS)
    wanted = wanted_shapes(modules, dim=dim, rank_pattern=rank_pattern, config=config)
    check_keys(file, wanted)
    check_scaling(path, values, file)
    for name, shape in wanted.items():
        check_shape(file, name, shape)
        if not all_finite(file.read(name)):
            problem = f"{name} has values that are not finite"
            raise adapter_error("not_finite", file.path, problem)
    return Adapter(
        directory=directory,
        config=config,
        dim=dim,
        alpha=alpha,
        dropout=float(values.get("lora_dropout") or 0.0),
        use_rslora=values.get("use_rslora") is True,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        base_model_name_or_path=values.get("base_model_name_or_path"),
        file=file,
    )


def find_adapter_dir(path: Path) -> Path | None:
    """Return ``path`` if it is an adapter, else the save that its tracker names, else None."""
    if (path / ADAPTER_CONFIG).is_file():
        return path
    tracker = path / TRACKER
    text = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
    latest = path / f"iter_{int(text):07d}" if text.isdecimal() else None
    return latest if latest and (latest / ADAPTER_CONFIG).is_file() else None


def _require_files(directory: Path) -> None:
    has_config, has_weights = (
        (directory / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    )
    if (directory / _PICKLED).is_file() and not has_weights:
        problem = f"{directory} has a pickled adapter ({_PICKLED})"
        raise pickled_weights(directory, problem, _CONVERT_PICKLED)
    if not has_config or not has_weights:
        file = ADAPTER_WEIGHTS if has_config else ADAPTER_CONFIG
        raise adapter_error("missing", directory, f"{directory} has no {file}")


def _number(value: float) -> float:
    """Return a number as PEFT writes it: 32 rather than 32.0."""
    return int(value) if float(value).is_integer() else value


def _target_modules(modules: Iterable[str], config: DecoderConfig) -> list[str]:
    """Return the shortest names that make PEFT adapt these modules and no others, sorted."""
    by_leaf: dict[str, list[str]] = {}
    for module in modules:
        by_leaf.setdefault(module.rsplit(".", 1)[-1], []).append(module)
    names = ([leaf] if len(own) == config.num_layers else own for leaf, own in by_leaf.items())
    return sorted(name for own in names for name in own)
