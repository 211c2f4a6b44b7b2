"""Writes Hugging Face directories: safetensors files block by block, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from nemotron.artifacts import Artifact, Input, Producer, publish, write_artifact
from nemotron.steps._formats.huggingface import (
    CHAT_TEMPLATE,
    INDEX_FILE,
    WEIGHTS_FILE,
    HuggingFaceCheckpoint,
    copy_model_files,
    model_properties,
)
from nemotron.steps._formats.safetensors_file import write_safetensors
from nemotron.steps._formats.threads import NUM_AT_A_TIME
from nemotron.steps._formats.weight_files import (
    Compare,
    PassingWeights,
    Receipt,
    Written,
    read_back,
    write_files,
)
from nemotron.steps._formats.weights import ReportedWeights, Weights, read_json, size_bytes
from nemotron.steps._models.families import in_both_spellings

MAX_SHARD_BYTES = 5_000_000_000


def publish_huggingface(
    root: Path,
    weights: Weights,
    *,
    source: Path,
    has_tokenizer: bool = True,
    chat_template: str | None = None,
    produced_by: Producer,
    inputs: Sequence[Input],
    properties: Callable[[], Mapping[str, Any]] = dict,
    show_progress: bool = True,
    compare: Compare | None = None,
    resume_key: str | None = None,
) -> Artifact:
    """Write weights as a ``checkpoint_hf`` artifact, read it back and give it its name.

    Args:
        root: The final directory; an earlier artifact there is replaced.
        weights: The weights to write.
        source: Directory that config, generation config, tokenizer and chat template come from.
        has_tokenizer: Whether tokenizer and chat template are copied.
        chat_template: Replaces the chat template in ``source``, if given.
        produced_by: Producer for ``artifact.json``.
        inputs: Inputs for ``artifact.json``.
        properties: Called after the weights were written; returns further properties.
        show_progress: Print a line every few seconds.
        compare: Gets the weights as they are read back; returns further properties.
        resume_key: Digest of what the bytes depend on: a killed run with the same key is continued,
            see ``publish``. Without it the work starts over.

    Raises:
        NemotronError: As ``publish`` and ``compare``; ``artifact_damaged`` where what was read back
            is not what was written.
    """
    with publish(root, step=produced_by.step, resume_key=resume_key) as directory:
        copy_model_files(source, directory, has_tokenizer=has_tokenizer)
        _spell_twice(directory / "config.json")
        if has_tokenizer and chat_template is not None:
            (directory / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        reported = ReportedWeights(weights, f"writing {root}") if show_progress else weights
        written = write_weights(directory, reported)
        reread = HuggingFaceCheckpoint(directory)
        compared = read_back(reread, written, where=directory, compare=compare)
        model = model_properties(source, weights.config, written.fingerprint)
        return write_artifact(
            directory,
            artifact_type="checkpoint_hf",
            produced_by=produced_by,
            inputs=inputs,
            properties={**model, **properties(), **compared},
            digests=written.digests,
        )


def write_weights(
    directory: Path,
    weights: Weights,
    *,
    max_shard_bytes: int | None = None,
) -> Written:
    """Write ``model.safetensors``, or shards with an index.

    Args:
        directory: The directory to write to, which exists.
        weights: The weights to write, a block of a tensor at a time.
        max_shard_bytes: Most bytes of tensors in one file, ``MAX_SHARD_BYTES`` by default; a
            larger tensor gets a file of its own.
    """
    passing = PassingWeights(weights)
    shards = _plan_shards(weights, max_shard_bytes or MAX_SHARD_BYTES)

    def write(file: str) -> Receipt:
        header, names = write_safetensors(
            directory / file,
            names=shards[file],
            shape=weights.shape,
            dtype=weights.dtype,
            blocks=passing.blocks,
            num_at_a_time=max(1, NUM_AT_A_TIME // len(shards)),
        )
        pieces = [(len(header), blake3(header).hexdigest())]
        pieces += [(size_bytes(weights, name), passing.blake3[name]) for name in names]
        return {"blake3": pieces, **passing.receipt(names)}

    receipts = write_files(directory, shards, write, stop=passing.stop)
    if len(shards) > 1:
        _write_index(directory, shards, weights)
    return passing.written(receipts)


def _spell_twice(config_path: Path) -> None:
    config = read_json(config_path)
    if (both := in_both_spellings(config)) != config:
        config_path.write_text(json.dumps(both, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_index(directory: Path, shards: Mapping[str, list[str]], weights: Weights) -> None:
    total = sum(size_bytes(weights, name) for name in weights.names)
    places = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
