"""Writes the files around the tensors of a Megatron checkpoint, for Megatron-Bridge 0.3 and later.

Of the two generations of this layout, this is the older one (``common.pt``, four fields in
``metadata.json``), which all versions read.

Source: Megatron-Bridge, training/checkpointing.py; Megatron-LM, core/dist_checkpointing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemotron.steps._formats.megatron import RUN_CONFIG, TRACKER, TRAIN_STATE

_TRAINING = "megatron.bridge.training"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_iteration_files(
    root: Path, iteration_dir: Path, run_config: Mapping[str, Any], *, iteration: int
) -> None:
    """Write what marks an iteration as complete and names it as the latest; call it last.

    Args:
        root: The checkpoint root.
        iteration_dir: The iteration, its tensors written.
        run_config: Content of its ``run_config.yaml``.
        iteration: Its number.
    """
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    common = {"checkpoint_version": 3.0, "iteration": iteration, "content_metadata": content}
    _save(common, iteration_dir / "common.pt")
    _save(_train_state(iteration), iteration_dir / "train_state.pt")
    text = yaml.safe_dump(dict(run_config))
    (iteration_dir / RUN_CONFIG).write_text(text, encoding="utf-8")
    (iteration_dir / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    _save(_train_state(iteration), root / TRAIN_STATE)
    (root / TRACKER).write_text(str(iteration), encoding="utf-8")


def run_config_sections(
    *, source_name: str, pretrained_checkpoint: str | None = None
) -> dict[str, Any]:
    """Return the sections of a ``run_config.yaml`` that are not the model's.

    Args:
        source_name: Where tokenizer and model came from on the Hugging Face side.
        pretrained_checkpoint: The base of an adapter.
    """
    return {
        "_target_": f"{_TRAINING}.config.ConfigContainer",
        "checkpoint": {
            "_target_": f"{_TRAINING}.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "pretrained_checkpoint": pretrained_checkpoint,
            "save_optim": False,
            "save_rng": False,
        },
        "tokenizer": {
            "_target_": f"{_TRAINING}.tokenizers.config.TokenizerConfig",
            "tokenizer_model": source_name,
            "tokenizer_type": "HuggingFaceTokenizer",
        },
    }


def _save(value: Mapping[str, Any], path: Path) -> None:
    """Save a small value by way of memory: torch does not say why it cannot write its own file."""
    held = io.BytesIO()
    torch.save(value, held)
    path.write_bytes(held.getvalue())


def _train_state(iteration: int) -> dict[str, torch.Tensor]:
    counters = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        "step": torch.tensor(iteration, dtype=torch.int32),
        **{name: torch.tensor(0, dtype=torch.int32) for name in counters},
        "floating_point_operations_so_far": torch.tensor(0.0),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }
