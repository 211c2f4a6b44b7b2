"""The identity of a run: everything that its result depends on, as data.

A run can resume from another's saves if both have the same identity. Torch-free, because the
launcher compares identities before it starts anything. A new key of the schema is part of the
identity until it is listed here as one that changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron.artifacts import MANIFEST, read_artifact, sha256_json
from nemotron.steps.peft.megatron_bridge.schema import Config

# Keys that are not part of the identity: where things are and how often they happen; how batch and
# model are split; and what is compared by its content, or by one property for all its spellings.
_HARMLESS_SECTIONS = (
    "checkpoint.", "checkpoint_patch.", "dataset.", "dist.", "hf_load.", "logger.", "scheduler.",
)  # fmt: skip
# Of recipe and model.
_HARMLESS_NAMES = {
    "context_parallel_size",
    "data_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_size",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "seq_length",
    "sequence_parallel",
    "tensor_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
}
_HARMLESS_KEYS = {
    "hf_model_path",
    "recipe._target_",
    "train.eval_interval",
    "train.eval_iters",
    "train.micro_batch_size",
    "train.train_iters",
}


def run_identity(config: Config, packed_root: Path, base_path: Path) -> dict[str, Any]:
    """Return the values that a save must have in common with a run that resumes from it.

    Args:
        config: The run's config.
        packed_root: Output directory of data_prep/sft_packing; its train rows are part of it.
        base_path: The base; its fingerprint is part of it, or its path if it has none.
    """
    values = dict(_leaves(config.model_dump(mode="json", by_alias=True)))
    identity = {key: value for key, value in values.items() if not _is_harmless(key)}
    identity["seq_length"] = config.seq_length
    identity |= _schedule(config) | _orders(config)
    if not config.model.calculate_per_token_loss:
        identity["train.micro_batch_size"] = config.train.micro_batch_size
    if config.checkpoint.other_run is not None:
        identity["checkpoint.load"] = str(config.checkpoint.other_run.resolve())
        identity["checkpoint.ckpt_step"] = config.checkpoint.ckpt_step
    packs = read_artifact(packed_root, "packed_parquet")
    rows = {f.path: f.blake3 for f in packs.files if f.path.startswith("splits/train/")}
    identity["train rows"] = sha256_json(rows)[:12]
    identity["tokenizer"] = packs.properties["tokenizer_blake3"]
    identity["base"] = _base(base_path)
    return identity


def _schedule(config: Config) -> dict[str, Any]:
    """Return what the learning rate depends on, in whichever keys it was stated."""
    style = config.scheduler.lr_decay_style
    values: dict[str, Any] = {
        "scheduler.lr_decay_style": style,
        "scheduler.lr_warmup_iters": config.lr_warmup_iters,
    }
    if config.lr_warmup_iters:
        values["scheduler.lr_warmup_init"] = config.scheduler.lr_warmup_init
    if style != "constant":
        values["scheduler.lr_decay_iters"] = config.lr_decay_iters
    if style == "WSD":
        values["scheduler.lr_wsd_decay_iters"] = config.scheduler.lr_wsd_decay_iters
        values["scheduler.lr_wsd_decay_style"] = config.scheduler.lr_wsd_decay_style
    return values


def _orders(config: Config) -> dict[str, Any]:
    """Return the order of patterns, of which the first match counts, if there are several."""
    patterns = {
        "peft.rank_pattern": config.peft.rank_pattern,
        "peft.alpha_pattern": config.peft.alpha_pattern,
    }
    return {f"order of {key}": list(each) for key, each in patterns.items() if len(each) > 1}


def _base(path: Path) -> str:
    root = next((each for each in (path, path.parent) if (each / MANIFEST).is_file()), None)
    if root is None:
        return str(path.resolve())
    return str(read_artifact(root, "checkpoint_megatron").properties.get("base_fingerprint"))


def _is_harmless(key: str) -> bool:
    if key in _HARMLESS_KEYS or key.startswith(_HARMLESS_SECTIONS):
        return True
    section, _, name = key.rpartition(".")
    return section in ("recipe", "model") and name in _HARMLESS_NAMES


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
