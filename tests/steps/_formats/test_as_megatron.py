"""A Hugging Face directory read by Megatron's names, whole or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint


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
