"""Writes Megatron checkpoints that Megatron-Bridge 0.3 and later read.

Layers are stacked, one chunk per layer, so that the checkpoint can be written and read one tensor
at a time.

Source: Megatron-Bridge, training/checkpointing.py; Megatron-LM, core/dist_checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nemotron.artifacts import Artifact, Input, Producer, publish, write_artifact
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.fingerprint import Compare, Fingerprint, read_back
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
from nemotron.steps._formats.torch_dist import TorchDistWriter
from nemotron.steps._formats.weights import ReportedWeights, Weights
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import LORA_TARGETS, WeightRule, join_rows, weight_rules

_ITERATION = 0  # Megatron's number for an import


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
) -> Artifact:
    """Write weights as a ``checkpoint_megatron`` artifact, read it back and give it its name.

    Args:
        root: The checkpoint's final directory; an earlier artifact there is replaced.
        weights: What to write.
        source: Hugging Face directory whose config, tokenizer and chat template go along.
        source_name: What the run config names as the source model.
        produced_by: Goes into ``artifact.json``.
        inputs: Go into ``artifact.json``.
        show_progress: Print a line every few seconds.
        compare: Gets the weights as they are read back; what it returns goes into the properties.

    Raises:
        NemotronError: As ``write_megatron``, ``publish`` and ``compare``; ``artifact_damaged``
            where what was read back is not what was written.
    """
    with publish(root) as directory:
        reported = ReportedWeights(weights, f"writing {root}") if show_progress else weights
        fingerprint = write_megatron(directory, reported, source=source, source_name=source_name)
        written = MegatronWeights(open_megatron(directory))
        compared = read_back(written, fingerprint, where=directory, compare=compare)
        return write_artifact(
            directory,
            artifact_type="checkpoint_megatron",
            produced_by=produced_by,
            inputs=inputs,
            properties=model_properties(source, weights.config, fingerprint) | compared,
        )


def write_megatron(root: Path, weights: Weights, *, source: Path, source_name: str) -> str:
    """Write weights as a Megatron checkpoint and return their base fingerprint.

    Holds the parts of one Megatron tensor at a time. The files that mark a checkpoint as complete
    come last.

    Args:
        root: Where to write; exists and is empty.
        weights: What to write.
        source: Hugging Face directory whose config, tokenizer and chat template go along.
        source_name: What the run config names as the source model.

    Raises:
        NemotronError: ``weights_dtype``: tensors that share one Megatron tensor differ in type.
    """
    dtype = _check_dtypes(weights)
    iteration_dir = root / f"iter_{_ITERATION:07d}"
    iteration_dir.mkdir()
    fingerprint = _write_tensors(iteration_dir, weights)
    copy_files(source, iteration_dir / "tokenizer", TOKENIZER_FILES)
    copy_model_files(source, root / HF_DIR)
    dtype_name = str(dtype).removeprefix("torch.")
    run_config = {
        **run_config_sections(source_name=source_name),
        "model": weights.config.to_run_config(dtype_name=dtype_name, source_name=source_name),
    }
    write_iteration_files(root, iteration_dir, run_config, iteration=_ITERATION)
    return fingerprint


def _write_tensors(iteration_dir: Path, weights: Weights) -> str:
    config, num_layers = weights.config, weights.config.num_layers
    fingerprint = Fingerprint()
    with TorchDistWriter(iteration_dir) as writer:
        for rule, layer in _places(config):
            parts = [weights.read(name) for name in _hf_names(rule, layer)]
            for name, part in zip(_hf_names(rule, layer), parts, strict=True):
                fingerprint.add(name, part)
            tensor = join_rows(parts, layout=rule.layout, config=config)
            if layer is None:
                writer.write(rule.megatron, tensor)
                continue
            offsets, shape = (layer, *[0] * tensor.dim()), (num_layers, *rule.shape)
            writer.write(rule.megatron, tensor[None], offsets=offsets, global_shape=shape)
            module = rule.megatron.removesuffix(".weight")
            if module.rsplit(".", 1)[-1] in LORA_TARGETS:
                # Megatron-Bridge up to 0.4 asks for the (empty) state of every linear layer.
                writer.write_object(f"{module}._extra_state/shard_{layer}_{num_layers}", [None])
    return fingerprint.hexdigest()


def _places(config: DecoderConfig) -> Iterator[tuple[WeightRule, int | None]]:
    """Yield every Megatron tensor with its layer, or None outside of layers."""
    for rule in weight_rules(config):
        layers = range(config.num_layers) if rule.is_layered else (None,)
        yield from ((rule, layer) for layer in layers)


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
                    f"{name} is {weights.dtype(name)} and {other} is {dtype}",
                    where=name,
                    why=f"both are part of {rule.megatron}, which has one type",
                    fix="save the model with one type for all layers",
                    exit_code=ExitCode.DATA,
                )
    return weights.dtype("model.embed_tokens.weight")
