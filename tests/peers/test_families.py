"""Every model family against transformers: logits, and weights to Megatron's layout and back."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.huggingface_writer import write_weights
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron, read_run_config
from nemotron.steps._formats.megatron_writer import write_megatron
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._training.base_model import load_base_model
from tests.peers.families import (
    LLAMA31_ROPE,
    MODELS,
    VOCABULARY,
    make_model,
    spell_as_transformers_4,
)

CU_SEQLENS = (0, 11, 12, 40)
CASES = [
    pytest.param("llama-3.1", True, 4, id="llama-3.1, tied, spelt as by transformers 4"),
    pytest.param("llama-3.1", False, 5, id="llama-3.1"),
    pytest.param("mistral", False, 4, id="mistral, spelt as by transformers 4"),
    pytest.param("mistral", True, 5, id="mistral, tied"),
    pytest.param("qwen2.5", True, 4, id="qwen2.5, tied, spelt as by transformers 4"),
    pytest.param("qwen2.5", False, 5, id="qwen2.5"),
    pytest.param("qwen3", False, 4, id="qwen3, spelt as by transformers 4"),
    pytest.param("qwen3", True, 5, id="qwen3, tied"),
]


@pytest.mark.parametrize(("family", "tied", "spelling"), CASES)
def test_a_model_of_every_family_converts_bitwise_and_has_the_logits_of_transformers(
    tmp_path: Path, family: str, tied: bool, spelling: int
) -> None:
    model = make_model(family, tied=tied)
    hf, base, back = (tmp_path / name for name in ("hf", "base", "back"))
    model.save_pretrained(hf, max_shard_size="20KB")
    if spelling == 4:
        spell_as_transformers_4(hf)
    base.mkdir()
    back.mkdir()
    weights = HuggingFaceCheckpoint(hf)
    write_megatron(base, weights, source=hf, source_name="x")
    checkpoint = open_megatron(base)

    write_weights(back, MegatronWeights(checkpoint))
    returned = load_file(back / "model.safetensors")
    shards = [load_file(path) for path in sorted(hf.glob("*.safetensors"))]
    original = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) > 1
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[name], original[name]) for name in original)

    ours = load_base_model(
        checkpoint,
        lora=None,
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    tokens = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = ours.logits(ours(tokens, CU_SEQLENS))
        for start, stop in pairwise(CU_SEQLENS):
            wanted = model(tokens[start:stop].unsqueeze(0)).logits[0]
            # fp32 logits of size about 5: a few ulps of 5e-7.
            assert (got[start:stop] - wanted).abs().max() < 5e-6


@pytest.mark.parametrize("family", MODELS)
def test_the_run_config_alone_describes_the_same_model(tmp_path: Path, family: str) -> None:
    model = make_model(family)
    if family == "llama-3.1":  # as Megatron would have it
        rope = {**LLAMA31_ROPE, "original_max_position_embeddings": 8192}
        model = make_model(family, rope_parameters=rope)
    model.save_pretrained(tmp_path / "hf")
    weights = HuggingFaceCheckpoint(tmp_path / "hf")
    (tmp_path / "base").mkdir()
    write_megatron(tmp_path / "base", weights, source=tmp_path / "hf", source_name="x")
    run_config = read_run_config(tmp_path / "base" / "iter_0000000")
    assert DecoderConfig.from_run_config(run_config) == weights.config
    written = weights.config.to_hf(dtype_name="float32")
    assert DecoderConfig.from_hf(written) == weights.config
    assert written["architectures"] == model.config.architectures
