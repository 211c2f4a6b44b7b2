"""The tiny base: what transformers loads, how big it is, and that it was really trained."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from nemotron.steps import _tiny
from nemotron.steps._tiny import corpus, pretrain
from nemotron.steps._tiny.build import SEED, token_stream

ROOT = Path(_tiny.__file__).parent
MODEL = ROOT / "model"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
CAPITALS = "Capitals of the world"


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return LlamaForCausalLM.from_pretrained(MODEL).eval()


def test_files_are_small_enough_to_ship() -> None:
    sizes = {path.name: path.stat().st_size for path in ROOT.rglob("*.*") if path.is_file()}
    assert sizes.pop("model.safetensors") < 3_000_000
    assert max(sizes.values()) < 200_000


def test_transformers_loads_every_weight_and_no_other() -> None:
    loaded: Any = LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_config_has_the_documented_shape(hf_model: Any) -> None:
    config = hf_model.config
    shape = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )
    assert shape == (128, 4, 8, 4, 16, 256, 1024, 2048)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 2, 0)
    assert (hf_model.generation_config.eos_token_id, hf_model.generation_config.pad_token_id) == (
        2,
        0,
    )
    assert json.loads((MODEL / "config.json").read_text("utf-8"))["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_logits_of_the_training_code_match_transformers(hf_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(1024, (2, 96), generator=generator)
    with torch.no_grad():
        ours = pretrain.logits(load_file(MODEL / "model.safetensors"), ids_BS)
        theirs = hf_model(ids_BS).logits
    # Two fp32 implementations of four layers; logits are of order ten.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_tokens", [128, 1024])
def test_base_predicts_its_own_kind_of_text(hf_model: Any, row_tokens: int) -> None:
    """Documents of another seed: the same facts in an order that pre-training never saw."""
    text = corpus.END_OF_TEXT.join(itertools.islice(corpus.documents(SEED + 1), 60))
    ids_BS = torch.tensor([TOKENIZER.encode(text).ids[:2048]]).view(-1, row_tokens)
    with torch.no_grad():
        loss = hf_model(ids_BS, labels=ids_BS).loss.item()
    # A uniform guess costs log(1024) = 6.9; which fact comes next is chance, about 0.8.
    assert loss < 0.2 * math.log(1024)


def test_base_knows_the_capitals_in_prose(hf_model: Any) -> None:
    facts = [fact for fact in corpus.load_world(SEED).facts if fact.kind.title == CAPITALS]
    num_known = 0
    for fact in facts:
        ids = torch.tensor([TOKENIZER.encode(f"<|endoftext|>The capital of {fact.subject} is").ids])
        wanted = TOKENIZER.encode(f" {fact.object}.").ids
        said = hf_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False
        )
        num_known += said[0, ids.shape[1] :].tolist() == wanted
    assert num_known >= 0.9 * len(facts)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads share a sum as they come, which changes its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_pretrain_is_deterministic_and_lowers_the_loss() -> None:
    stream = token_stream(TOKENIZER, 6 * 4 * 64 + 1)

    def run() -> dict[str, torch.Tensor]:
        return pretrain.pretrain(stream, num_steps=6, step_tokens=256, num_rows=4, seed=5)

    first, again = run(), run()
    before = pretrain.initial_weights(torch.Generator().manual_seed(5))
    assert first.keys() == before.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    ids_BS = stream[: 4 * 64].view(4, 64)

    def loss(weights: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            logits = pretrain.logits(weights, ids_BS[:, :-1])
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids_BS[:, 1:].flatten()
        ).item()

    assert loss(first) < loss(before) - 0.1
