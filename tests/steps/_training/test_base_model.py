"""A model loaded in parts: each reads its own tensors, and the parts make the whole."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model

NUM_LAYERS, HIDDEN, VOCABULARY = 3, 16, 29
LORA = LoraTargets(("linear_qkv", "linear_fc2"), LoraSpec(2, 4.0))


class RandomWeights:
    """A checkpoint of random tensors, each the same whenever it is read."""

    def __init__(self, *, is_tied: bool) -> None:
        self.config = DecoderConfig.from_hf(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_hidden_layers": NUM_LAYERS,
                "hidden_size": HIDDEN,
                "intermediate_size": 24,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCABULARY,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e4,
                "tie_word_embeddings": is_tied,
                "max_position_embeddings": 64,
                "hidden_act": "silu",
            }
        )
        self.names_read: set[str] = set()
        self._shapes = {
            "word_embeddings.weight": (VOCABULARY, HIDDEN),
            "output_layer.weight": (VOCABULARY, HIDDEN),
            "linear_qkv.weight": (32, HIDDEN),
            "linear_proj.weight": (HIDDEN, HIDDEN),
            "linear_fc1.weight": (48, HIDDEN),
            "linear_fc2.weight": (HIDDEN, 24),
        }

    def read(self, name: str, *, layer: int | None = None, **slices: Any) -> Tensor:
        """Return a tensor, or the slice of it."""
        self.names_read.add(name if layer is None else f"{layer}: {name}")
        digest = hashlib.sha256(f"{name}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        shape = self._shapes.get(".".join(name.split(".")[-2:]), (HIDDEN,))
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "rows" in slices:
            tensor = tensor[slices["rows"]]
        return tensor[:, slices["columns"]] if "columns" in slices else tensor


def load(reader: RandomWeights, layers: range | None = None) -> GPTModel:
    model = load_base_model(
        reader,
        lora=LORA,
        group=ProcessGroup(),
        dtype=torch.float64,
        device=torch.device("cpu"),
        layers=layers,
    )
    for linear in model.adapted_linears():
        linear.init_lora(7)
    return model


@pytest.mark.parametrize("is_tied", [False, True])
def test_parts_of_a_model_make_the_whole_bit_for_bit(is_tied: bool) -> None:
    reader = RandomWeights(is_tied=is_tied)
    whole = load(reader)
    parts = [load(reader, layers) for layers in (range(1), range(1, 2), range(2, NUM_LAYERS))]
    tokens_S, cu_seqlens = torch.arange(11), (0, 4, 11)
    x_SH = None
    for part in parts:
        x_SH = part(tokens_S, cu_seqlens, None, x_SH)
    assert x_SH is not None
    wanted_SH = whole(tokens_S, cu_seqlens)
    assert torch.equal(x_SH, wanted_SH)
    assert torch.equal(parts[-1].logits(x_SH), whole.logits(wanted_SH))
    names = [linear.name for part in parts for linear in part.adapted_linears()]
    assert names == [linear.name for linear in whole.adapted_linears()]


@pytest.mark.parametrize(
    ("layers", "is_tied", "ends"),
    [
        (range(1), False, {"embedding.word_embeddings.weight"}),
        (range(1, 2), False, set()),
        (range(2, 3), False, {"output_layer.weight", "decoder.final_layernorm.weight"}),
        (
            range(2, 3),
            True,
            {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"},
        ),
    ],
)
def test_a_part_reads_its_own_layers_and_ends_only(
    layers: range, is_tied: bool, ends: set[str]
) -> None:
    reader = RandomWeights(is_tied=is_tied)
    load(reader, layers)
    assert {name for name in reader.names_read if ": " not in name} == ends
    assert {name.split(":")[0] for name in reader.names_read - ends} == {str(layers.start)}


def test_a_model_is_split_over_the_sequence_where_that_was_asked_for() -> None:
    group = ProcessGroup(rank=1, size=2)
    sizes: dict[str, Any] = {"lora": LORA, "group": group, "dtype": torch.float64}
    for asked in (False, True):
        model = load_base_model(
            RandomWeights(is_tied=True),
            **sizes,
            device=torch.device("cpu"),
            sequence_parallel=asked,
        )
        assert {linear.sequence_parallel for linear in model.linears()} == {asked}
