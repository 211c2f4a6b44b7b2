"""Hugging Face directories as transformers saves them, and as they should not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.artifacts import blake3_file
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.huggingface import (
    HuggingFaceCheckpoint,
    copy_model_files,
    read_chat_template,
    tokenizer_blake3,
)

SaveLlama = Callable[..., LlamaForCausalLM]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _change(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def _error(directory: Path) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        HuggingFaceCheckpoint(directory)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_read_gives_every_parameter_bit_by_bit(
    tmp_path: Path, save_llama: SaveLlama, is_tied: bool, max_shard_size: str
) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=is_tied, max_shard_size=max_shard_size)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    wanted = dict(model.named_parameters())
    assert set(checkpoint.names) == wanted.keys()
    for name in checkpoint.names:
        assert checkpoint.shape(name) == tuple(wanted[name].shape)
        assert checkpoint.dtype(name) == torch.float32
        assert torch.equal(checkpoint.read(name), wanted[name])


def test_open_ignores_rotary_frequencies_and_a_copy_of_the_tied_embedding(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    names = HuggingFaceCheckpoint(tmp_path).names

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _change(tmp_path, change)
    assert HuggingFaceCheckpoint(tmp_path).names == names


def test_open_refuses_an_lm_head_that_is_not_the_tied_embedding(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path, tie_word_embeddings=True)
    _change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 16)}))
    error = _error(tmp_path)
    assert error.code == "weights_unexpected"
    assert "lm_head.weight differs from the embedding" in error.problem


def test_open_names_a_missing_tensor_and_the_closest_one(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path)
    right, wrong = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.upp_proj.weight"
    _change(tmp_path, lambda tensors: tensors.update({wrong: tensors.pop(right)}))
    error = _error(tmp_path)
    assert error.code == "weights_incomplete"
    assert error.problem == (f"missing tensors of the model: 1, first {right} (closest: {wrong})")


def test_open_names_an_unexpected_tensor(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    _change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(16)}))
    error = _error(tmp_path)
    assert error.code == "weights_unexpected"
    assert name in error.problem


def test_open_names_a_tensor_of_another_shape(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    _change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(16, 23)}))
    error = _error(tmp_path)
    assert error.code == "weights_shape"
    assert error.problem == f"{name} has shape [16, 23]; config.json requires [16, 24]"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_open_refuses_pickled_weights_with_the_command_that_converts_them(
    tmp_path: Path, save_llama: SaveLlama, name: str
) -> None:
    save_llama(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / name)
    error = _error(tmp_path)
    assert error.code == "pickled_weights"
    assert "save_pretrained" in error.fix


def test_open_names_a_truncated_shard(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    error = _error(tmp_path)
    assert error.code == "artifact_damaged"
    assert shard.name in error.problem


def test_open_names_a_missing_shard(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path, max_shard_size="4KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    error = _error(tmp_path)
    assert error.code == "artifact_damaged"
    assert f"{shard}: the file is missing" in error.problem


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "it has no weight_map"),
        ({"x": "../model.safetensors"}, "points outside the directory"),
        ({"x": "part.safetensors"}, "x is not in it"),
        ({"x": ["part.safetensors"]}, "its weight_map has file names that are not text"),
        ({"x": None, "y": "part.safetensors"}, "its weight_map has file names that are not text"),
    ],
)
def test_open_refuses_an_index_that_makes_no_sense(
    tmp_path: Path, save_llama: SaveLlama, places: dict[str, Any], message: str
) -> None:
    save_llama(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "part.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    error = _error(tmp_path)
    assert error.code == "artifact_damaged"
    assert message in error.problem


def test_open_refuses_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "config.json: it is not a JSON object" in _error(tmp_path).problem


def test_open_names_the_config_that_is_not_supported(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"hidden_act": "gelu"}
    path.write_text(json.dumps(values), encoding="utf-8")
    error = _error(tmp_path)
    assert (error.code, error.where) == ("model_unsupported", str(path))


def test_open_says_what_a_directory_lacks(tmp_path: Path, save_llama: SaveLlama) -> None:
    assert "does not exist" in _error(tmp_path / "nowhere").problem
    assert "has no config.json" in _error(tmp_path).problem
    save_llama(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    error = _error(tmp_path)
    assert error.code == "checkpoint_missing"
    assert "has neither model.safetensors nor" in error.problem


def test_copy_model_files_takes_config_and_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "additional_chat_templates").mkdir()
    wanted = {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"),
        *("tekken.json", "tokenizer.model", "tokenizer.model.v3"),
        "additional_chat_templates/tool_use.jinja",
    }
    for name in wanted:
        (source / name).write_text(name, encoding="utf-8")
    (source / "modeling_custom.py").write_text("raise SystemExit", encoding="utf-8")
    (source / "additional_chat_templates" / "notes.txt").write_text("", encoding="utf-8")
    copy_model_files(source, tmp_path / "all")
    copy_model_files(source, tmp_path / "bare", has_tokenizer=False)
    copies = (path for path in (tmp_path / "all").rglob("*") if path.is_file())
    assert {str(path.relative_to(tmp_path / "all")) for path in copies} == wanted
    bare = {path.name for path in (tmp_path / "bare").iterdir()}
    assert bare == {"config.json", "generation_config.json"}


def test_tokenizer_blake3_is_of_the_file_or_none(tmp_path: Path) -> None:
    assert tokenizer_blake3(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert tokenizer_blake3(tmp_path) == blake3_file(tmp_path / "tokenizer.json")


def test_read_chat_template_prefers_the_jinja_file(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}", encoding="utf-8")
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert read_chat_template(tmp_path) == "d"
    config.write_text(json.dumps({"chat_template": "plain"}), encoding="utf-8")
    assert read_chat_template(tmp_path) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert read_chat_template(tmp_path) == "file"
