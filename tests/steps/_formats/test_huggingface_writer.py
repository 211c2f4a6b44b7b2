"""What we write, read by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nemotron.steps._formats import weight_files
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint, copy_model_files
from nemotron.steps._formats.huggingface_writer import write_weights

SaveLlama = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 4_000, 1])
def test_transformers_loads_what_write_weights_wrote(
    tmp_path: Path, save_llama: SaveLlama, is_tied: bool, max_shard_bytes: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = save_llama(source, tie_word_embeddings=is_tied, dtype=torch.bfloat16)
    copy_model_files(source, target)
    weights = HuggingFaceCheckpoint(source)
    written = write_weights(target, weights, max_shard_bytes=max_shard_bytes)
    assert written.fingerprint == base_fingerprint(weights)
    both: Any = LlamaForCausalLM.from_pretrained(
        target, dtype=torch.bfloat16, output_loading_info=True
    )
    loaded, report = both
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_write_weights_fills_shards_up_to_the_limit_and_indexes_them(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    save_llama(tmp_path / "source")
    weights = HuggingFaceCheckpoint(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    limit = 5_000  # the embedding, 61 * 16 * 4 bytes, and little more
    write_weights(target, weights, max_shard_bytes=limit)
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    sizes = {name: weights.read(name).nbytes for name in weights.names}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert index["weight_map"].keys() == sizes.keys()
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = [sizes[name] for name, place in index["weight_map"].items() if place == file]
        assert sum(held) <= limit


class Failing:
    """Weights of which one tensor fails once another one is half read."""

    def __init__(self, weights: HuggingFaceCheckpoint) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype, self.read = weights.shape, weights.dtype, weights.read
        self.num_rows = 0
        self._begun, self._failed = Event(), Event()

    def blocks(self, name: str) -> Iterator[Tensor]:
        if name == "model.embed_tokens.weight":
            for row in self.read(name).split(1):
                self.num_rows += 1
                self._begun.set()
                assert self._failed.wait(60)
                sleep(0.01)
                yield row
        else:
            assert self._begun.wait(60)
            self._failed.set()
            raise KeyError("mine")


def test_a_file_is_not_written_to_its_end_once_another_has_failed(
    tmp_path: Path, save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "NUM_AT_A_TIME", 2)
    save_llama(tmp_path / "source")
    (tmp_path / "target").mkdir()
    failing = Failing(HuggingFaceCheckpoint(tmp_path / "source"))
    with pytest.raises(KeyError, match="mine"):
        write_weights(tmp_path / "target", failing, max_shard_bytes=1)
    assert failing.num_rows < failing.shape("model.embed_tokens.weight")[0] // 2
