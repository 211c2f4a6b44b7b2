"""Patterns on the names of linears."""

from __future__ import annotations

import pytest

from nemotron.steps._models.layouts import LORA_TARGETS, lora_hf_modules
from nemotron.steps._models.targets import (
    LINEARS,
    first_match,
    linear_names,
    matches,
    unmatched,
)


def test_linear_names_are_those_of_the_layouts() -> None:
    assert LINEARS.keys() == LORA_TARGETS.keys()
    names = linear_names(2)
    assert len({module for name in names for module in lora_hf_modules(name)}) == 2 * 7


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("linear_qkv", list(range(12))),
        ("*.layers.0.*.linear_qkv", [0]),
        ("*.layers.1.*.linear_qkv", [1]),
        ("decoder.layers.1?.self_attention.*", [10, 11]),
        ("decoder.layers.[0-2].*", [0, 1, 2]),
        ("decoder.layers.7.self_attention.linear_qkv", [7]),
        ("*", list(range(12))),
        ("LINEAR_QKV", []),
        ("layers.0.self_attention.linear_qkv", []),
        ("qkv", []),
    ],
)
def test_a_pattern_names_the_layers_that_megatron_bridge_would_adapt(
    pattern: str, layers: list[int]
) -> None:
    names = [f"decoder.layers.{layer}.self_attention.linear_qkv" for layer in range(12)]
    assert [layer for layer, name in enumerate(names) if matches(pattern, name)] == layers


def test_the_first_of_several_patterns_counts() -> None:
    name = "decoder.layers.0.mlp.linear_fc1"
    assert first_match(["linear_qkv", "*.layers.0.*", "linear_fc1"], name) == "*.layers.0.*"
    assert first_match(["linear_qkv"], name) is None


def test_unmatched_gives_the_closest_names() -> None:
    found = unmatched(["linear_qkv", "decoder.layers.2.mlp.linear_fc1"], linear_names(2))
    (closest,) = found.values()
    assert closest[0] == "decoder.layers.1.mlp.linear_fc1"
    assert len(closest) == 3
