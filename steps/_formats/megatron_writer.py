"""Writes Megatron checkpoints that Megatron-Bridge 0.3 and later read.

Layers are stacked, one chunk per layer, so that the checkpoint can be written and read one tensor
at a time; several files are written at once.

Source: Megatron-Bridge, training/checkpointing.py; Megatron-LM, core/dist_checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from nemotron.artifacts import Artifact, Input, Producer, publish, write_artifact
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import (
    TOKENIZER_FILES,
    copy_files,
    copy_model_files,
    model_properties,
)
from nemotron.steps._formats.megatron import (
    HF_DIR,
    MegatronWeights,
    open_megatron,
)
from nemotron.steps._formats.megatron_files import run_config_sections, write_iteration_files
from nemotron.steps._formats.torch_dist_writer import (
    StoredItem,
    TorchDistFile,
    without_crc32,
    write_metadata,
)
from nemotron.steps._formats.weight_files import (
    Compare,
    PassingWeights,
    Receipt,
    Written,
    read_back,
    write_files,
)
from nemotron.steps._formats.weights import ReportedWeights, Weights, size_bytes
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import (
    LORA_TARGETS,
    WeightRule,
    hf_tensors,
    weight_rules,
)

MAX_FILE_BYTES = 500_000_000  # of tensors; a larger one gets its own file
_ITERATION = 0  # Megatron's number for an import
Place = tuple[WeightRule, int | None]  # a Megatron tensor and its layer, None outside of layers


def publish_megatron(
    root: Path,
    weights: Weights,
    *,
    source: Path,
    source_name: str,
    produced_by: Producer,
    inputs: Sequence[Input],
    show_progress: bool = True,
    compare: Compare | None = None,
    resume_key: str | None = None,
) -> Artifact:
    """Write weights as a ``checkpoint_megatron`` artifact, read it back and give it its name.

    Args:
        root: The checkpoint's final directory; an earlier artifact there is replaced.
        weights: The weights to write.
        source: Hugging Face directory whose config, tokenizer and chat template are copied.
        source_name: The source model's name in the run config.
        produced_by: Producer for ``artifact.json``.
        inputs: Inputs for ``artifact.json``.
        show_progress: Print a line every few seconds.
        compare: Gets the weights as they are read back; returns further properties.
        resume_key: Digest of what the bytes depend on: a killed run with the same key is continued,
            see ``publish``. Without it the work starts over.

    Raises:
        NemotronError: As ``write_megatron``, ``publish`` and ``compare``; ``artifact_damaged``
            where what was read back is not what was written.
    """
    with publish(root, step=produced_by.step, resume_key=resume_key) as directory:
        reported = ReportedWeights(weights, f"writing {root}") if show_progress else weights
        written = write_megatron(
            directory,
            reported,
            source=source,
            source_name=source_name,
        )
        reread = MegatronWeights(open_megatron(directory))
        compared = read_back(reread, written, where=directory, compare=compare)
        return write_artifact(
            directory,
            artifact_type="checkpoint_megatron",
            produced_by=produced_by,
            inputs=inputs,
            properties=model_properties(source, weights.config, written.fingerprint) | compared,
            digests=written.digests,
        )


def write_megatron(
    root: Path,
    weights: Weights,
    *,
    source: Path,
    source_name: str,
) -> Written:
    """Write weights as a Megatron checkpoint.

    For each file that is being written, a block of each part of a tensor is held. The files that
    mark the checkpoint as complete are written last.

    Args:
        root: The directory to write to, which exists and holds nothing else.
        weights: The weights to write.
        source: Hugging Face directory whose config, tokenizer and chat template are copied.
        source_name: The source model's name in the run config.

    Raises:
        NemotronError: ``weights_dtype``: tensors that share one Megatron tensor differ in type.
    """
    dtype = _check_dtypes(weights)
    iteration_dir = root / f"iter_{_ITERATION:07d}"
    iteration_dir.mkdir(exist_ok=True)
    written = _write_tensors(root, iteration_dir, weights)
    copy_files(source, iteration_dir / "tokenizer", TOKENIZER_FILES)
    copy_model_files(source, root / HF_DIR)
    dtype_name = str(dtype).removeprefix("torch.")
    run_config = {
        **run_config_sections(source_name=source_name),
        "model": weights.config.to_run_config(dtype_name=dtype_name, source_name=source_name),
    }
    write_iteration_files(root, iteration_dir, run_config, iteration=_ITERATION)
    return written


def _write_tensors(root: Path, iteration_dir: Path, weights: Weights) -> Written:
    passing = PassingWeights(weights)
    files = _plan_files(weights)

    def write(file: str) -> Receipt:
        places = files[file]
        with TorchDistFile(root / file) as stream:
            for rule, layer in places:
                _write_place(stream, passing, rule, layer)
        names = [name for rule, layer in places for name in _hf_names(rule, layer)]
        return {
            "blake3": stream.blake3,
            "items": [asdict(item) for item in stream.items],
            **passing.receipt(names),
        }

    with without_crc32():
        receipts = write_files(root, files, write, stop=passing.stop)
    write_metadata(
        iteration_dir,
        (StoredItem(**item) for receipt in receipts.values() for item in receipt["items"]),
    )
    return passing.written(receipts)


def _write_place(
    stream: TorchDistFile, weights: Weights, rule: WeightRule, layer: int | None
) -> None:
    """Write one Megatron tensor, of one layer where it has layers."""
    blocks = AsMegatron(weights).blocks(rule.megatron, layer=layer)
    dtype = weights.dtype(_hf_names(rule, layer)[0])
    if layer is None:
        stream.write_blocks(rule.megatron, blocks, sizes=rule.shape, dtype=dtype)
        return
    num_layers = weights.config.num_layers
    stream.write_blocks(
        rule.megatron,
        blocks,
        sizes=(1, *rule.shape),
        dtype=dtype,
        offsets=(layer, *[0] * len(rule.shape)),
        global_shape=(num_layers, *rule.shape),
    )
    module = rule.megatron.removesuffix(".weight")
    if module.rsplit(".", 1)[-1] in LORA_TARGETS:
        # Megatron-Bridge up to 0.4 asks for the (empty) state of every linear layer.
        stream.write_object(f"{module}._extra_state/shard_{layer}_{num_layers}", [None])


def _plan_files(weights: Weights) -> dict[str, list[Place]]:
    """Return the tensors of each file, in the order of the model."""
    files: list[list[Place]] = [[]]
    filled = 0
    for rule, layer in _places(weights.config):
        size = sum(size_bytes(weights, name) for name in _hf_names(rule, layer))
        if files[-1] and filled + size > MAX_FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append((rule, layer))
        filled += size
    return {f"iter_{_ITERATION:07d}/__0_{number}.distcp": held for number, held in enumerate(files)}


def _places(config: DecoderConfig) -> list[Place]:
    """Return every Megatron tensor with its layer, in the order of the model."""
    rules = {rule.megatron: rule for rule in weight_rules(config)}
    places = ((tensor.rule.megatron, tensor.layer) for tensor in hf_tensors(config).values())
    return [(rules[name], layer) for name, layer in dict.fromkeys(places)]


def _hf_names(rule: WeightRule, layer: int | None) -> tuple[str, ...]:
    return tuple(name.format(layer=layer) for name in rule.hf)


def _check_dtypes(weights: Weights) -> torch.dtype:
    """Return the type of the embedding, after checking that each stacked tensor has one type."""
    first: dict[str, tuple[str, torch.dtype]] = {}
    for rule, layer in _places(weights.config):
        for name in _hf_names(rule, layer):
            other, dtype = first.setdefault(rule.megatron, (name, weights.dtype(name)))
            if weights.dtype(name) != dtype:
                raise NemotronError(
                    "weights_dtype",
                    f"{name} is {weights.dtype(name)}, but {other} is {dtype}",
                    where=name,
                    why=f"both are part of {rule.megatron}, which has a single type",
                    fix="save the model with one type for all layers",
                    exit_code=ExitCode.DATA,
                )
    return weights.dtype("model.embed_tokens.weight")
