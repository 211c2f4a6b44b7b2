"""A Hugging Face directory read by Megatron's names, whole or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nemotron.steps._formats import weights
from nemotron.steps._formats.as_megatron import AsMegatron, _Rows
from nemotron.steps._formats.fingerprint import DigestedWeights
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.layouts import weight_rules


@pytest.mark.parametrize(
    "rows",
    [(0, 24), (24, 48), (0, 48), (3, 9), (23, 24), (24, 25), (30, 48), (23, 25), (7, 40), (24, 24)],
)
def test_rows_of_gate_and_up_are_those_of_the_whole(
    tmp_path: Path, save_llama: Callable[..., LlamaForCausalLM], rows: tuple[int, int]
) -> None:
    save_llama(tmp_path)
    hf = HuggingFaceCheckpoint(tmp_path)
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
    whole = torch.cat([hf.read(name) for name in names])
    name, part, columns = "decoder.layers.mlp.linear_fc1.weight", slice(*rows), slice(2, 11)
    got = AsMegatron(hf).read(name, layer=1, rows=part)
    assert torch.equal(got, whole[part])
    got = AsMegatron(hf).read(name, layer=1, rows=part, columns=columns)
    assert torch.equal(got, whole[part, columns])


@pytest.mark.parametrize("elements", [1, 40, 200, 1 << 18])
def test_blocks_are_the_whole_tensor_however_its_parts_come(
    tmp_path: Path,
    save_llama: Callable[..., LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    elements: int,
) -> None:
    save_llama(tmp_path)
    monkeypatch.setattr(weights, "_ELEMENTS_AT_A_TIME", elements)  # of rows of 16
    digested = DigestedWeights(HuggingFaceCheckpoint(tmp_path))
    megatron = AsMegatron(digested)
    for rule in weight_rules(megatron.config):
        layer = 1 if rule.is_layered else None
        blocks = list(megatron.blocks(rule.megatron, layer=layer))
        assert torch.equal(torch.cat(blocks), megatron.read(rule.megatron, layer=layer))
        assert all(name.format(layer=1) in digested.digests for name in rule.hf)


def test_rows_more_or_fewer_than_a_rule_has_are_refused() -> None:
    rows = _Rows(iter([torch.zeros(3, 2), torch.zeros(2, 2)]))
    assert [len(block) for block in rows.take(4)] == [3, 1]
    with pytest.raises(ValueError, match="more rows than its rule says"):
        rows.end()
    with pytest.raises(ValueError, match="fewer rows than its rule says"):
        list(rows.take(2))
