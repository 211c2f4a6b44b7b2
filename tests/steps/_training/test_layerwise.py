"""The proof of a merge: the logits that the trainer computes, and none of a merge gone wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.lora import fused_factors
from nemotron.steps._formats.weights import Weights, row_blocks
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._models.layouts import lora_shapes
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training import layerwise
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.layerwise import compare_merged, fixed_documents, logits
from nemotron.steps.convert.merge_lora.merge import MergedWeights
from tests.peers.families import MODELS, make_model

CU_SEQLENS = [0, 1, 3, 8]  # the window of Mistral's model is 4


class RandomAdapter:
    """Factors of every module whose name holds one of ``parts``, each with its own lora_a."""

    def __init__(self, weights: Weights, parts: tuple[str, ...]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.config = weights.config
        self._factors = {
            module: (
                0.2 * torch.randn(2, shape[1], generator=generator),
                0.2 * torch.randn(shape[0], 2, generator=generator),
            )
            for module, shape in lora_shapes(self.config).items()
            if any(part in module for part in parts)
        }
        self.modules = tuple(self._factors)

    def scale(self, module: str) -> float:
        return 1.5 if "q_proj" in module else 2.0

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        return self._factors[module]


class Slow:
    """Weights of which a tensor takes 20 ms."""

    def __init__(self, weights: Weights) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self.num_read = 0
        self._weights = weights

    def read(self, name: str) -> Tensor:
        self.num_read += 1
        sleep(0.02)
        return self._weights.read(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        return row_blocks(self.read(name))


class Changed:
    """Weights of which one tensor is not what it should be."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self._weights, self._name = weights, name

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        return tensor.roll(1, 0) if name == self._name else tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        return row_blocks(self.read(name))


def save(family: str, directory: Path, *, tied: bool, dtype: torch.dtype) -> HuggingFaceCheckpoint:
    model = make_model(family, tied=tied)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(directory)
    return HuggingFaceCheckpoint(directory)


def trainers_logits(weights: Weights, adapter: Any, tokens_S: Tensor) -> Tensor:
    layers = range(weights.config.num_layers)
    factors = {k: v for i in layers for k, v in fused_factors(adapter, i).items()}
    ranks = {name: len(lora_a) for name, (lora_a, _) in factors.items()}
    lora = LoraTargets(list(ranks), LoraSpec(dim=1, alpha=1.0), ranks, dict(ranks))
    model = load_base_model(
        AsMegatron(weights),
        lora=lora if ranks else None,
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for linear in model.adapted_linears():
        linear.load_lora(*factors[linear.name])
    with torch.no_grad():
        return model.logits(model(tokens_S, CU_SEQLENS))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_logits_of_mapped_weights_are_the_trainers_in_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(layerwise, "_ELEMENTS_AT_A_TIME", 7 * 32)  # the last blocks are cut short
    weights = save(family, tmp_path, tied=tied, dtype=dtype)
    adapter: Any = RandomAdapter(weights, ("q_proj", "v_proj", "o_proj", "up_proj", "1.mlp.down"))
    nothing: Any = RandomAdapter(weights, ())
    documents = fixed_documents(weights)
    assert documents.packed.cu_seqlens == CU_SEQLENS
    without, with_adapter = logits(weights, documents, adapter=adapter).chunk(2)
    # fp32, in another order of sums; logits are below 20.
    for got, of in ((without, nothing), (with_adapter, adapter)):
        wanted = trainers_logits(weights, of, documents.tokens)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(weights, documents), without, rtol=0, atol=2e-5)
    assert (with_adapter - without).abs().max() > 0.5


@pytest.mark.parametrize("family", MODELS)
def test_a_merge_with_any_tensor_out_of_order_differs(tmp_path: Path, family: str) -> None:
    base = save(family, tmp_path, tied=False, dtype=torch.float32)
    adapter: Any = RandomAdapter(base, ("_proj",))
    merged = MergedWeights(base, adapter)
    assert compare_merged(base, adapter, merged).is_equal
    names = [name for name in merged.names if "layers.1." not in name]  # every kind once
    assert len(names) >= 12
    for name in names:
        assert not compare_merged(base, adapter, Changed(merged, name)).is_equal, name


def test_a_right_merge_that_rounding_moves_far_is_told_from_a_wrong_one(tmp_path: Path) -> None:
    torch.manual_seed(3)  # the worst of 20: rounding moves a logit by 55 standard deviations
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    base = HuggingFaceCheckpoint(tmp_path)
    adapter: Any = RandomAdapter(base, ("_proj",))
    merged = MergedWeights(base, adapter)
    right = compare_merged(base, adapter, merged)
    assert right.largest_difference > right.tolerance
    assert right.is_equal
    wrong = compare_merged(base, adapter, Changed(merged, "model.layers.1.mlp.up_proj.weight"))
    assert not wrong.is_equal


def test_angles_of_positions_are_computed_before_there_is_a_second_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save("llama-3.1", tmp_path, tied=False, dtype=torch.float32)
    adapter: Any = RandomAdapter(base, ("_proj",))
    num_threads, tables = [], layerwise.rotary_tables

    def computed(*arguments: Any, **options: Any) -> Any:
        num_threads.append(threading.active_count())
        return tables(*arguments, **options)

    monkeypatch.setattr(layerwise, "rotary_tables", computed)
    compare_merged(base, adapter, MergedWeights(base, adapter))
    assert num_threads == [threading.active_count()]


def test_a_comparison_that_is_interrupted_ends_after_the_layer_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save("llama-3.1", tmp_path, tied=False, dtype=torch.float32)
    adapter: Any = RandomAdapter(base, ("_proj",))
    merged = Slow(base)

    def interrupt(module: str) -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare_merged(base, adapter, merged)
    assert merged.num_read < len(base.names) - 2
