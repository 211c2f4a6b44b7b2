"""Writes Megatron checkpoints that Megatron-Bridge 0.3 and later read.

Of the two generations on disk this is the older one (``common.pt``, four fields in
``metadata.json``), which every version reads. Layers are stacked, one chunk per layer, so that the
checkpoint can be written and read one tensor at a time.

Source: Megatron-Bridge, training/checkpointing.py; Megatron-LM, core/dist_checkpointing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from nemotron.artifacts import Artifact, Input, Producer, publish, write_artifact
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.fingerprint import Fingerprint, base_fingerprint
from nemotron.steps._formats.huggingface import (
    TOKENIZER_FILES,
    copy_files,
    copy_model_files,
    model_properties,
)
from nemotron.steps._formats.megatron import (
    HF_DIR,
    RUN_CONFIG,
    TRACKER,
    TRAIN_STATE,
    MegatronWeights,
    open_megatron,
)
from nemotron.steps._formats.torch_dist import TorchDistWriter
from nemotron.steps._formats.weights import ReportedWeights, Weights, damaged
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import LORA_TARGETS, WeightRule, join_rows, weight_rules

_ITERATION = 0  # Megatron's number for an import
_BRIDGE = "megatron.bridge"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def publish_megatron(
    root: Path,
    weights: Weights,
    *,
    source: Path,
    source_name: str,
    produced_by: Producer,
    inputs: Sequence[Input],
    show_progress: bool = True,
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

    Raises:
        NemotronError: As ``write_megatron`` and ``publish``; ``artifact_damaged`` where what was
            read back is not what was written.
    """
    with publish(root) as directory:
        reported = ReportedWeights(weights, f"writing {root}") if show_progress else weights
        fingerprint = write_megatron(directory, reported, source=source, source_name=source_name)
        if base_fingerprint(MegatronWeights(open_megatron(directory))) != fingerprint:
            raise damaged(directory, "the weights read back are not those that were written")
        return write_artifact(
            directory,
            artifact_type="checkpoint_megatron",
            produced_by=produced_by,
            inputs=inputs,
            properties=model_properties(source, weights.config, fingerprint),
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
    torch.save(_common_state(), iteration_dir / "common.pt")
    torch.save(_train_state(), iteration_dir / "train_state.pt")
    run_config = yaml.safe_dump(_run_config(weights.config, dtype, source_name))
    (iteration_dir / RUN_CONFIG).write_text(run_config, encoding="utf-8")
    copy_files(source, iteration_dir / "tokenizer", TOKENIZER_FILES)
    copy_model_files(source, root / HF_DIR)
    (iteration_dir / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    torch.save(_train_state(), root / TRAIN_STATE)
    (root / TRACKER).write_text(str(_ITERATION), encoding="utf-8")
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


def _common_state() -> dict[str, Any]:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"checkpoint_version": 3.0, "iteration": _ITERATION, "content_metadata": content}


def _train_state() -> dict[str, torch.Tensor]:
    counters = (
        "step",
        "consumed_train_samples",
        "skipped_train_samples",
        "consumed_valid_samples",
    )
    return {
        **{name: torch.tensor(_ITERATION, dtype=torch.int32) for name in counters},
        "floating_point_operations_so_far": torch.tensor(0.0),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }


def _run_config(config: DecoderConfig, dtype: torch.dtype, source_name: str) -> dict[str, Any]:
    """Return what readers of Megatron-Bridge checkpoints look up."""
    training = f"{_BRIDGE}.training"
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "_target_": f"{training}.config.ConfigContainer",
        "checkpoint": {
            "_target_": f"{training}.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "save_optim": False,
            "save_rng": False,
        },
        "model": config.to_run_config(dtype_name=dtype_name, source_name=source_name),
        "tokenizer": {
            "_target_": f"{training}.tokenizers.config.TokenizerConfig",
            "tokenizer_model": source_name,
            "tokenizer_type": "HuggingFaceTokenizer",
        },
    }
