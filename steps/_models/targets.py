"""Patterns that name linears of a decoder: a linear's own name, or a wildcard on its full name.

``linear_qkv`` names that linear in every layer. Wildcards such as ``*.layers.0.*.linear_qkv`` and
``decoder.layers.1?.self_attention.*`` are matched against full names such as
``decoder.layers.3.mlp.linear_fc1``, as Megatron-Bridge does. Torch-free, because the launcher asks
the same questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

LINEARS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}


def linear_names(num_layers: int) -> list[str]:
    """Return the full name of every linear of a decoder, in the order of the model."""
    return [
        f"decoder.layers.{layer}.{parent}.{linear}"
        for layer in range(num_layers)
        for linear, parent in LINEARS.items()
    ]


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern names a linear, given by its full name; case counts."""
    return pattern == name.rsplit(".", 1)[-1] or fnmatchcase(name, pattern)


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """Return the first pattern that names a linear; None if none does."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def unmatched(patterns: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the patterns that match none of ``names``, each with the three closest names."""
    return {
        pattern: get_close_matches(pattern, names, n=3, cutoff=0.0)
        for pattern in patterns
        if not any(matches(pattern, name) for name in names)
    }
