"""``nemotron adapter diff``: compares what two adapters add to the weights.

The factors of a LoRA are not unique: ``B M`` and ``M^-1 A`` are the same adapter. So the products
``scale * B A`` are compared, by Frobenius norms, which are computed from R x R products without
forming a weight.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from nemotron.artifacts import Producer
from nemotron.steps._adapter.opening import open_with_base
from nemotron.steps._adapter.schema import DiffConfig
from nemotron.steps._entry import run_step
from nemotron.steps._formats.lora import LoraAdapter

_SHOWN = 10
Factors = tuple[Tensor, Tensor]


def run(config: DiffConfig, producer: Producer) -> None:
    """Compare two adapters of one base and print where they differ."""
    one = open_with_base(config.adapter, base=config.base, base_digests=False)
    other = open_with_base(config.other, base=config.base or one.base_path, base_digests=False)
    found = compare(one.adapter, other.adapter)
    print(json.dumps(found, indent=2) if config.as_json else _page(found))


def compare(one: LoraAdapter, other: LoraAdapter) -> dict[str, Any]:
    """Return the differences between two adapters, in their settings and each module's delta."""
    keys = ("dim", "alpha", "use_rslora", "dropout", "target_modules")
    settings = {key: [getattr(one, key), getattr(other, key)] for key in keys}
    first, second = set(one.modules), set(other.modules)
    modules = {
        module: _compare_deltas(
            _delta(one, module) if module in first else None,
            _delta(other, module) if module in second else None,
        )
        for module in dict.fromkeys([*one.modules, *other.modules])
    }
    total = sum(each["norm"] ** 2 for each in modules.values())
    apart = sum(each["difference"] ** 2 for each in modules.values())
    return {
        "settings": {key: pair for key, pair in settings.items() if pair[0] != pair[1]},
        "only_in_first": sorted(first - second),
        "only_in_second": sorted(second - first),
        "relative_difference": math.sqrt(apart / total) if total else math.sqrt(apart),
        "modules": modules,
    }


def _compare_deltas(first: Factors | None, second: Factors | None) -> dict[str, float]:
    """Return the Frobenius norms of the first delta and of the difference; None stands for zero."""
    square, other_square = (_product(each, each) if each else 0.0 for each in (first, second))
    squares = square + other_square
    if first and second:
        squares -= 2 * _product(first, second)
        if all(map(torch.equal, first, second)):
            squares = 0.0
    return {"norm": math.sqrt(max(square, 0.0)), "difference": math.sqrt(max(squares, 0.0))}


def _delta(adapter: LoraAdapter, module: str) -> Factors:
    lora_a, lora_b = adapter.read(module)
    return lora_a.double(), lora_b.double() * adapter.scale(module)


def _product(one: Factors, other: Factors) -> float:
    """Return the Frobenius product of ``B1 A1`` and ``B2 A2``: tr((B1^T B2) (A2 A1^T))."""
    return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())


def _page(found: dict[str, Any]) -> str:
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in found["settings"].items()]
    for key in ("only_in_first", "only_in_second"):
        lines += [f"{key.replace('_', ' ')}: {', '.join(found[key])}"] if found[key] else []
    modules = found["modules"]
    apart = [name for name, each in modules.items() if each["difference"] > 0]
    lines.append(
        f"modules that differ: {len(apart)} of {len(modules)}; relative difference of what they "
        f"add to the weights: {found['relative_difference']:.3e}"
    )
    apart.sort(key=lambda name: -modules[name]["difference"])
    for name in apart[:_SHOWN]:
        each = modules[name]
        lines.append(f"  {name}: {each['difference']:.3e} of {each['norm']:.3e}")
    if len(apart) > _SHOWN:
        lines.append(f"  and {len(apart) - _SHOWN} more (--json lists all)")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_step("adapter diff", DiffConfig, run))
