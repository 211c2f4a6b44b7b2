"""The interface of all adapters: two factors and a scale per Hugging Face module, read lazily.

``adapter`` implements it for PEFT's directories, ``megatron_adapter`` for Megatron-Bridge's
checkpoints; merging, verifying and exporting are written against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import join_lora_rows, lora_hf_modules, lora_shapes
from nemotron.steps._models.targets import linear_names

# Why an adapter is refused, and what to do about it, by kind of error.
_SAVED = "use the adapter as its trainer saved it"
_CONFIG = "use the config that the adapter was saved with"
MERGE_IN_PEFT = (
    "merge it in PEFT: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
    ".save_pretrained(DIR); or use a plain LoRA adapter on linear layers of the decoder"
)
_REASONS = {
    "missing": (
        "an adapter consists of a config and tensors",
        "pass a directory with adapter_config.json and adapter_model.safetensors, or an adapter "
        "checkpoint of Megatron-Bridge",
    ),
    "config": (
        "ignoring the setting would silently change what the adapter does",
        "use a plain LoRA adapter on linear layers of the decoder",
    ),
    "prefix": (
        "PEFT would load none of them and leave the base as it is",
        "rename the tensors to base_model.model.<module>.lora_A.weight, as PEFT saves them",
    ),
    "half_missing": ("an adapter is a product: half of it changes nothing", _SAVED),
    "keys_missing": ("modules without tensors would be left as they are in the base", _SAVED),
    "keys_unexpected": ("tensors that belong to no module of the base would be left out", _SAVED),
    "rank": ("the adapter is scaled by alpha / rank: another rank makes another model", _CONFIG),
    "alpha": ("the adapter is scaled by alpha / rank: another alpha makes another model", _CONFIG),
    "shape": (
        "the adapter was trained on a model of another size, or its file was changed",
        "use the base that the adapter was trained on, and the config it was saved with",
    ),
    "not_finite": (
        "one such value turns every logit into NaN",
        "use an earlier save of the adapter; its training diverged",
    ),
}


class LoraAdapter(Protocol):
    """A checked adapter; ``modules`` are Hugging Face names such as ``model.layers.0.mlp.up_proj``.

    Attributes:
        directory: Where it lies.
        config: Sizes of the model it adapts.
        dim: LoRA rank of most modules.
        alpha: LoRA alpha of most modules.
        dropout: Dropout it was trained with.
        use_rslora: Whether the scale is ``alpha / sqrt(dim)`` instead of ``alpha / dim``.
        rank_pattern: LoRA rank of the other modules, by PEFT's patterns.
        alpha_pattern: LoRA alpha of the other modules, likewise.
        target_modules: Names of the adapted modules or their last parts, sorted.
        base_model_name_or_path: What it says it was trained on.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def config(self) -> DecoderConfig: ...
    @property
    def dim(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def use_rslora(self) -> bool: ...
    @property
    def rank_pattern(self) -> Mapping[str, int]: ...
    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...
    @property
    def target_modules(self) -> tuple[str, ...]: ...
    @property
    def base_model_name_or_path(self) -> str | None: ...
    @property
    def modules(self) -> tuple[str, ...]: ...

    def scale(self, module: str) -> float:
        """Return what the product of the factors of one of ``modules`` is multiplied by."""
        ...

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """Return lora_a [R, in features] and lora_b [out features, R] of one of ``modules``."""
        ...


def fused_factors(adapter: LoraAdapter, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return fp32 (lora_a, lora_b) by Megatron linear of one layer, with the scale in lora_b.

    ``lora_b @ lora_a`` is exactly what the adapter adds to the linear's weight. If the parts of a
    fused linear share lora_a, that is used; otherwise theirs are stacked, and R is the sum of
    their ranks.
    """
    prefix, modules = f"decoder.layers.{layer}.", set(adapter.modules)
    shapes = lora_shapes(adapter.config)
    factors = {}
    for name in linear_names(adapter.config.num_layers):
        parts = lora_hf_modules(name)
        if not name.startswith(prefix) or modules.isdisjoint(parts):
            continue
        rows = {part: shapes[part][0] for part in parts}
        lora_a, lora_b = _stacked(adapter, rows, modules)
        factors[name] = lora_a, join_lora_rows(name, lora_b, config=adapter.config)
    return factors


def _stacked(
    adapter: LoraAdapter, rows: Mapping[str, int], adapted: set[str]
) -> tuple[Tensor, list[Tensor]]:
    """Return one lora_a for the parts of a linear, given with their rows, and each one's lora_b."""
    own = {part: adapter.read(part) for part in rows if part in adapted}
    factors_a = [a for a, _ in own.values()]
    is_shared = all(torch.equal(factors_a[0], a) for a in factors_a[1:])
    lora_a = factors_a[0].float() if is_shared else torch.cat([a.float() for a in factors_a])
    lora_b, first = [], 0
    for part, num_rows in rows.items():
        wide = torch.zeros(num_rows, len(lora_a))
        if part in own:
            _, b = own[part]
            columns = slice(None) if is_shared else slice(first, first + b.shape[1])
            wide[:, columns] = b.float() * adapter.scale(part)
            first += b.shape[1]
        lora_b.append(wide)
    return lora_a, lora_b


def adapter_error(kind: str, where: Path, problem: str, *, fix: str | None = None) -> NemotronError:
    """Return the error ``adapter_<kind>`` of an adapter that cannot be used as it is."""
    why, usual_fix = _REASONS[kind]
    return NemotronError(
        f"adapter_{kind}",
        problem,
        where=str(where),
        why=why,
        fix=fix or usual_fix,
        exit_code=ExitCode.DATA,
    )
