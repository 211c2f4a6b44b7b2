"""Writes the weights of a Hugging Face directory as safetensors, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from nemotron.steps._formats.fingerprint import Fingerprint
from nemotron.steps._formats.huggingface import INDEX_FILE, WEIGHTS_FILE
from nemotron.steps._formats.safetensors_file import write_safetensors
from nemotron.steps._formats.weights import Weights, size_bytes

MAX_SHARD_BYTES = 5_000_000_000


def write_weights(
    directory: Path, weights: Weights, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> str:
    """Write ``model.safetensors``, or shards with an index, and return the base fingerprint.

    Args:
        directory: Where to write; exists.
        weights: What to write; one tensor is held at a time.
        max_shard_bytes: Most bytes of tensors in one file; a larger tensor gets its own file.
    """
    fingerprint = Fingerprint()

    def read(name: str) -> Tensor:
        tensor = weights.read(name)
        fingerprint.add(name, tensor)
        return tensor

    shards = _plan_shards(weights, max_shard_bytes)
    for file, names in shards.items():
        write_safetensors(
            directory / file, names=names, shape=weights.shape, dtype=weights.dtype, read=read
        )
    if len(shards) > 1:
        total = sum(size_bytes(weights, name) for name in weights.names)
        places = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (directory / INDEX_FILE).write_text(text, encoding="utf-8")
    return fingerprint.hexdigest()


def _plan_shards(weights: Weights, max_shard_bytes: int) -> dict[str, list[str]]:
    """Return the names of the tensors of each file, in the order of the model."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in weights.names:
        size = size_bytes(weights, name)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    total = len(shards)
    return {
        f"model-{number:05d}-of-{total:05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }
