"""What we write as a Megatron checkpoint: bit by bit the source, in the layout that peers read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import LlamaForCausalLM

from nemotron.artifacts import Producer, read_artifact, verify_files
from nemotron.errors import NemotronError
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps._formats.megatron_writer import publish_megatron, write_megatron
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import TorchDistFile
from nemotron.steps._models.config import DecoderConfig

SaveLlama = Callable[..., LlamaForCausalLM]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_a_round_trip_is_bitwise(
    tmp_path: Path,
    save_llama: SaveLlama,
    is_tied: bool,
    dtype: torch.dtype,
    num_key_value_heads: int,
) -> None:
    model = save_llama(
        tmp_path / "hf",
        dtype=dtype,
        tie_word_embeddings=is_tied,
        num_key_value_heads=num_key_value_heads,
        max_shard_size="4KB",
    )
    root = tmp_path / "megatron"
    root.mkdir()
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    written = write_megatron(root, hf, source=hf.directory, source_name="test")
    assert written.fingerprint == base_fingerprint(hf)
    weights = MegatronWeights(open_megatron(root))
    wanted = dict(model.named_parameters())
    assert set(weights.names) == wanted.keys()
    for name in weights.names:
        tensor = weights.read(name)
        assert tensor.dtype == weights.dtype(name) == dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, wanted[name])


def test_write_megatron_lays_out_what_megatron_bridge_looks_for(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}", encoding="utf-8")
    root = tmp_path / "megatron"
    root.mkdir()
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    write_megatron(root, hf, source=hf.directory, source_name="test")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {
        "hf/config.json",
        "hf/generation_config.json",
        "hf/tokenizer.json",
        "iter_0000000/.metadata",
        "iter_0000000/__0_0.distcp",
        "iter_0000000/common.pt",
        "iter_0000000/metadata.json",
        "iter_0000000/run_config.yaml",
        "iter_0000000/tokenizer/tokenizer.json",
        "iter_0000000/train_state.pt",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    }
    iteration_dir = root / "iter_0000000"
    assert json.loads((iteration_dir / "metadata.json").read_text(encoding="utf-8")) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    common = torch.load(iteration_dir / "common.pt", weights_only=True)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)
    for path in (iteration_dir / "train_state.pt", root / "latest_train_state.pt"):
        state = torch.load(path, weights_only=True)
        assert all(tensor.dim() == 0 for tensor in state.values())
        assert state["step"] == 0
    assert (root / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "0"


def test_write_megatron_stacks_layers_one_chunk_each(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path / "hf")
    root = tmp_path / "megatron"
    root.mkdir()
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    write_megatron(root, hf, source=hf.directory, source_name="test")
    reader = TorchDistReader(root / "iter_0000000")
    name = "decoder.layers.mlp.linear_fc1.weight"
    assert reader.shape(name) == (2, 48, 16)
    assert [chunk.sizes for chunk in reader._chunks[name]] == [(1, 48, 16)] * 2


def test_torch_loads_every_tensor_and_the_extra_state_of_every_linear(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path / "hf")
    root = tmp_path / "megatron"
    root.mkdir()
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    write_megatron(root, hf, source=hf.directory, source_name="test")
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj")
    linears += ("mlp.linear_fc1", "mlp.linear_fc2")
    extra = [
        f"decoder.layers.{name}._extra_state/shard_{layer}_2"
        for name in linears
        for layer in range(2)
    ]
    reader = TorchDistReader(root / "iter_0000000")
    state: dict[str, Any] = {name: torch.zeros(reader.shape(name)) for name in reader.names}
    state |= {name: "to be replaced" for name in extra}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=FileSystemReader(root / "iter_0000000"), no_dist=True)
    for name in reader.names:
        assert torch.equal(state[name], reader.read(name))
    assert all(state[name] == [None] for name in extra)


@pytest.mark.parametrize("rope", [None, LLAMA3])
def test_the_run_config_says_what_the_hugging_face_config_says(
    tmp_path: Path, save_llama: SaveLlama, rope: dict[str, object] | None
) -> None:
    save_llama(tmp_path / "hf", **({"rope_parameters": rope} if rope else {}))
    root = tmp_path / "megatron"
    root.mkdir()
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    write_megatron(root, hf, source=hf.directory, source_name="test")
    text = (root / "iter_0000000" / "run_config.yaml").read_text(encoding="utf-8")
    assert DecoderConfig.from_run_config(yaml.safe_load(text)) == hf.config


def test_write_megatron_refuses_layers_of_different_types(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path)
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    with pytest.raises(NemotronError, match=f"{name} is torch.bfloat16") as caught:
        write_megatron(tmp_path, hf, source=hf.directory, source_name="test")
    assert caught.value.code == "weights_dtype"


def test_publish_megatron_leaves_a_verified_artifact(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path / "hf", tie_word_embeddings=True)
    (tmp_path / "hf" / "tokenizer.json").write_text("{}", encoding="utf-8")
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    publish_megatron(
        tmp_path / "out",
        hf,
        source=hf.directory,
        source_name="test",
        produced_by=Producer(step="test", config_sha256="0", code_version="0"),
        inputs=[],
    )
    artifact = read_artifact(tmp_path / "out", "checkpoint_megatron")
    verify_files(tmp_path / "out", artifact)
    assert artifact.properties == {
        "base_fingerprint": base_fingerprint(hf),
        "tokenizer_blake3": "6e46dd10defc9b56c29a6ec56b508c21f54c08192194e4df25bf36f0c9c3c279",
        "vocab_size": 61,
        "model_type": "llama",
    }
    assert open_megatron(tmp_path / "out").artifact == artifact


def test_publish_megatron_refuses_what_reads_back_otherwise(
    tmp_path: Path, save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "hf")
    hf = HuggingFaceCheckpoint(tmp_path / "hf")
    write_blocks = TorchDistFile.write_blocks

    def lose_a_bit(file: TorchDistFile, name: str, blocks: Iterator[Tensor], **more: Any) -> None:
        changed = (block * 1.0001 if "linear_proj" in name else block for block in blocks)
        write_blocks(file, name, changed, **more)

    monkeypatch.setattr(TorchDistFile, "write_blocks", lose_a_bit)
    with pytest.raises(
        NemotronError, match=r"o_proj\.weight differs from what was written"
    ) as caught:
        publish_megatron(
            tmp_path / "out",
            hf,
            source=hf.directory,
            source_name="test",
            produced_by=Producer(step="test", config_sha256="0", code_version="0"),
            inputs=[],
        )
    assert caught.value.code == "artifact_damaged"
    assert not (tmp_path / "out").exists()
