"""Megatron checkpoints in all the spellings that a reader meets, against the source's weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats import weights
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron import (
    MegatronWeights,
    find_iteration_dir,
    open_megatron,
    read_run_config,
)
from nemotron.steps._formats.megatron_writer import write_megatron
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import torch_dist_writer

SaveLlama = Callable[..., LlamaForCausalLM]
QKV = "decoder.layers.self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture
def hf(tmp_path: Path, save_llama: SaveLlama) -> HuggingFaceCheckpoint:
    save_llama(tmp_path / "hf")
    return HuggingFaceCheckpoint(tmp_path / "hf")


@pytest.fixture
def root(tmp_path: Path, hf: HuggingFaceCheckpoint) -> Path:
    directory = tmp_path / "megatron"
    directory.mkdir()
    write_megatron(directory, hf, source=hf.directory, source_name="test")
    return directory


def _rewrite(root: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of an iteration by what ``change`` makes of them."""
    iteration_dir = root / "iter_0000000"
    reader = TorchDistReader(iteration_dir)
    tensors = change({name: reader.read(name).clone() for name in reader.names})
    with torch_dist_writer(iteration_dir) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _error(path: Path) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        open_megatron(path)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


def test_read_gives_slices_of_the_layer_that_was_asked_for(
    root: Path, hf: HuggingFaceCheckpoint
) -> None:
    checkpoint = open_megatron(root)
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
    whole = torch.cat([hf.read(name) for name in names])
    fc1 = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(checkpoint.read(fc1, layer=1), whole)
    rows, columns = slice(20, 30), slice(3, 9)
    assert torch.equal(checkpoint.read(fc1, layer=1, rows=rows), whole[rows])
    assert torch.equal(checkpoint.read(fc1, layer=1, columns=columns), whole[:, columns])
    both = checkpoint.read(fc1, layer=1, rows=rows, columns=columns)
    assert torch.equal(both, whole[rows, columns])
    assert both.is_contiguous()
    norm = checkpoint.read("decoder.layers.mlp.linear_fc1.layer_norm_weight", layer=0)
    assert torch.equal(norm, hf.read("model.layers.0.post_attention_layernorm.weight"))
    assert torch.equal(
        checkpoint.read(EMBEDDING, rows=slice(5, 9)), hf.read("model.embed_tokens.weight")[5:9]
    )


@pytest.mark.parametrize("elements", [1, 40, 1 << 18])
def test_blocks_are_the_rows_of_the_tensor_and_what_is_fused_is_read_once(
    root: Path, hf: HuggingFaceCheckpoint, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(weights, "_ELEMENTS_AT_A_TIME", elements)
    checkpoint = open_megatron(root)
    read, fused = checkpoint.read, Counter[tuple[str, int | None]]()

    def count(name: str, *, layer: int | None = None) -> torch.Tensor:
        fused[name, layer] += 1
        return read(name, layer=layer)

    monkeypatch.setattr(checkpoint, "read", count)
    megatron = MegatronWeights(checkpoint)
    for name in megatron.names:
        blocks = list(megatron.blocks(name))
        assert torch.equal(torch.cat(blocks), hf.read(name))
        assert torch.equal(megatron.read(name), hf.read(name))
        assert elements > 1 or all(len(block) == 1 for block in blocks)
    assert set(fused.values()) == {1}


def test_read_wants_a_layer_exactly_where_there_are_layers(root: Path) -> None:
    checkpoint = open_megatron(root)
    with pytest.raises(ValueError, match="layer is None"):
        checkpoint.read(QKV)
    with pytest.raises(ValueError, match="layer is 0"):
        checkpoint.read(EMBEDDING, layer=0)


def test_open_takes_the_root_and_the_iteration_alike(root: Path) -> None:
    by_root, by_iteration = open_megatron(root), open_megatron(root / "iter_0000000")
    assert by_root.root == by_iteration.root == root
    assert by_root.hf_dir == by_iteration.hf_dir == root / "hf"
    assert by_root.iteration_dir == by_iteration.iteration_dir


def test_open_reads_the_run_config_where_there_is_no_hf_directory(root: Path) -> None:
    wanted = open_megatron(root).config
    shutil.rmtree(root / "hf")
    checkpoint = open_megatron(root)
    assert checkpoint.hf_dir is None
    assert checkpoint.config == wanted


def test_find_iteration_dir_believes_the_train_state_before_the_text_file(root: Path) -> None:
    shutil.copytree(root / "iter_0000000", root / "iter_0000007")
    (root / "latest_checkpointed_iteration.txt").write_text("7\n", encoding="utf-8")
    assert find_iteration_dir(root) == root / "iter_0000000"
    (root / "latest_train_state.pt").unlink()
    assert find_iteration_dir(root) == root / "iter_0000007"


def test_find_iteration_dir_reads_release(root: Path) -> None:
    (root / "iter_0000000").rename(root / "release")
    (root / "latest_train_state.pt").unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")
    assert find_iteration_dir(root) == root / "release"
    assert open_megatron(root).names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latest_train_state.pt", b"garbage", "does not load"),
        ("latest_checkpointed_iteration.txt", b"soon", "it says 'soon'; wanted a number"),
    ],
)
def test_find_iteration_dir_refuses_a_damaged_tracker(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = _error(tmp_path)
    assert error.code == "artifact_damaged"
    assert message in error.problem


def test_find_iteration_dir_says_what_is_missing(tmp_path: Path) -> None:
    assert "does not exist" in _error(tmp_path / "nowhere").problem
    assert "has no tracker file" in _error(tmp_path).problem
    (tmp_path / "config.json").touch()
    assert "is a Hugging Face checkpoint" in _error(tmp_path).problem
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    error = _error(tmp_path)
    assert error.code == "checkpoint_missing"
    assert "names iter_0000003, which does not exist" in error.problem


def test_layers_under_names_of_their_own_read_as_stacked_ones(
    root: Path, hf: HuggingFaceCheckpoint
) -> None:
    def per_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("decoder.layers.", f"decoder.layers.{layer}."): part
            for name, tensor in tensors.items()
            for layer, part in enumerate(tensor if "decoder.layers." in name else [tensor])
        }

    _rewrite(root, per_layer)
    assert base_fingerprint(MegatronWeights(open_megatron(root))) == base_fingerprint(hf)


def test_norms_under_the_names_of_the_local_spec_are_found(
    root: Path, hf: HuggingFaceCheckpoint
) -> None:
    names = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.input_layernorm.weight"
        ),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (
            "decoder.layers.pre_mlp_layernorm.weight"
        ),
    }
    _rewrite(root, lambda tensors: {names.get(k, k): v for k, v in tensors.items()})
    assert base_fingerprint(MegatronWeights(open_megatron(root))) == base_fingerprint(hf)


def test_padding_rows_of_the_vocabulary_are_never_returned(
    root: Path, hf: HuggingFaceCheckpoint
) -> None:
    def pad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        padding = torch.full((67, 16), float("nan"))
        vocabulary = (EMBEDDING, "output_layer.weight")
        return {k: torch.cat([v, padding]) if k in vocabulary else v for k, v in tensors.items()}

    _rewrite(root, pad)
    checkpoint = open_megatron(root)
    assert checkpoint.read(EMBEDDING).shape == (61, 16)
    assert checkpoint.read(EMBEDDING, rows=slice(50, 70)).shape == (11, 16)
    assert base_fingerprint(MegatronWeights(checkpoint)) == base_fingerprint(hf)


def test_training_state_beside_the_weights_is_left_alone(
    root: Path, hf: HuggingFaceCheckpoint
) -> None:
    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"optimizer.state.exp_avg.x": torch.zeros(3), "rng_state/a": torch.ones(1)}

    _rewrite(root, add)
    assert base_fingerprint(MegatronWeights(open_megatron(root))) == base_fingerprint(hf)


def test_open_names_an_unexpected_tensor(root: Path) -> None:
    name = "decoder.layers.self_attention.linear_qkv.bias"
    _rewrite(root, lambda tensors: tensors | {name: torch.zeros(2, 32)})
    error = _error(root)
    assert error.code == "weights_unexpected"
    assert name in error.problem


def test_open_names_a_missing_tensor(root: Path) -> None:
    _rewrite(root, lambda tensors: {k: v for k, v in tensors.items() if k != QKV})
    error = _error(root)
    assert error.code == "weights_incomplete"
    assert QKV in error.problem


def test_open_names_a_tensor_of_another_shape(root: Path) -> None:
    _rewrite(root, lambda tensors: tensors | {QKV: tensors[QKV][:, :-1]})
    error = _error(root)
    assert error.code == "weights_shape"
    assert error.problem == f"{QKV} has shape [2, 31, 16]; the config requires [2, 32, 16]"


def test_open_takes_no_other_tensor_for_a_padded_one(root: Path) -> None:
    name = "decoder.final_layernorm.weight"
    _rewrite(root, lambda tensors: tensors | {name: torch.ones(20)})
    error = _error(root)
    assert error.code == "weights_shape"
    assert error.problem == f"{name} has shape [20]; the config requires [16]"


def test_open_refuses_fsdp_dtensor_checkpoints(root: Path) -> None:
    (root / "iter_0000000" / "metadata.json").unlink()
    error = _error(root)
    assert error.code == "checkpoint_format"
    assert "fsdp_dtensor" in error.why


def test_open_refuses_another_backend(root: Path) -> None:
    path = root / "iter_0000000" / "metadata.json"
    path.write_text(json.dumps({"sharded_backend": "zarr"}), encoding="utf-8")
    error = _error(root)
    assert error.code == "checkpoint_format"
    assert "sharded_backend 'zarr'; wanted torch_dist" in error.problem


def test_open_says_that_the_metadata_is_missing(root: Path) -> None:
    (root / "iter_0000000" / ".metadata").unlink()
    error = _error(root)
    assert error.code == "checkpoint_missing"
    assert "has no .metadata" in error.problem


def test_open_names_a_truncated_file(root: Path) -> None:
    file = root / "iter_0000000" / "__0_0.distcp"
    with file.open("r+b") as stream:
        stream.truncate(1000)
    error = _error(root)
    assert error.code == "artifact_damaged"
    assert str(file) in error.problem


@pytest.mark.parametrize("text", ["- a\n", "a: [", "a: !!python/object/apply:os.getcwd []"])
def test_read_run_config_refuses_what_is_no_plain_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "run_config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(NemotronError, match="not a YAML mapping of plain values"):
        read_run_config(tmp_path)
