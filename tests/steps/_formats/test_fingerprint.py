"""The fingerprint against its definition, computed here with the safetensors library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from nemotron.steps._formats import weights
from nemotron.steps._formats.fingerprint import DigestedWeights, TensorDigests, base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint

SaveLlama = Callable[..., LlamaForCausalLM]


def _reference(path: Path) -> str:
    entries = [
        [
            name,
            {torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype],
            list(tensor.shape),
            blake3(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, tensor in sorted(load_file(path).items())
    ]
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def test_base_fingerprint_is_the_digest_of_names_types_shapes_and_bytes(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        directory = tmp_path / str(dtype)
        save_llama(directory, dtype=dtype)
        got = base_fingerprint(HuggingFaceCheckpoint(directory))
        assert got == _reference(directory / "model.safetensors")


def test_base_fingerprint_does_not_depend_on_sharding(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path / "one")
    save_llama(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (HuggingFaceCheckpoint(tmp_path / name) for name in ("one", "many"))
    assert base_fingerprint(one) == base_fingerprint(many)


def test_base_fingerprint_leaves_out_a_tied_lm_head(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    before = base_fingerprint(HuggingFaceCheckpoint(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert base_fingerprint(HuggingFaceCheckpoint(tmp_path)) == before


def test_fingerprint_sees_one_bit_a_name_a_type_and_a_shape_but_not_the_order() -> None:
    x, y = torch.arange(4.0), torch.ones(2, 2)

    def digest(**tensors: torch.Tensor) -> str:
        digests = TensorDigests()
        for name, tensor in tensors.items():
            digests.add(name, tensor)
        return digests.fingerprint()

    assert digest(x=x, y=y) == digest(y=y, x=x)
    bit = x.view(torch.int32).clone()
    bit[2] ^= 1
    others = [
        digest(x=bit.view(torch.float32), y=y),
        digest(z=x, y=y),
        digest(x=x.reshape(2, 2), y=y),
        digest(x=x, y=y.view(torch.float64)),
        digest(x=x),
    ]
    assert len({digest(x=x, y=y), *others}) == 6


def test_the_first_difference_is_a_tensor_that_is_another_or_in_one_only() -> None:
    def taken(**tensors: torch.Tensor) -> TensorDigests:
        digests = TensorDigests()
        for name, tensor in tensors.items():
            digests.add(name, tensor)
        return digests

    zeros, ones = torch.zeros(2), torch.ones(2)
    assert taken(a=zeros, b=ones).first_difference(taken(b=ones, a=zeros)) is None
    assert taken(a=zeros, b=ones).first_difference(taken(a=zeros, b=zeros)) == "b"
    assert taken(a=zeros).first_difference(taken(a=zeros.view(2, 1))) == "a"
    assert taken(a=zeros, b=ones).first_difference(taken(b=ones)) == "a"
    assert taken(b=ones).first_difference(taken(a=zeros, b=ones)) == "a"


def test_a_tensor_has_one_digest_however_it_is_read_and_none_before_its_end(
    tmp_path: Path, save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_ELEMENTS_AT_A_TIME", 40)  # two rows of 16, or less than one
    save_llama(tmp_path)
    whole, parts = (DigestedWeights(HuggingFaceCheckpoint(tmp_path)) for _ in range(2))
    for name in whole.names:
        tensor = whole.read(name)
        blocks = parts.blocks(name)
        first = next(blocks).clone()
        assert name not in parts.digests
        assert torch.equal(torch.cat([first, *blocks]), tensor)
        assert parts.digests[name] == whole.digests[name]
    assert parts.digests.first_difference(whole.digests) is None
    assert whole.digests.fingerprint() == base_fingerprint(HuggingFaceCheckpoint(tmp_path))
