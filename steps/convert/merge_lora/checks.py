"""Checks of a config of ``convert/merge_lora`` before it runs, without torch."""

from __future__ import annotations

from pathlib import Path

from nemotron.artifacts import refuse_overlap
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.convert.merge_lora.schema import Config

STEP = "convert/merge_lora"


def check(config: Config) -> list[NemotronError]:
    """Return the contradictions in a config."""
    errors = [
        step_error(STEP, "contradicting_paths", problem, where=key)
        for key, problem in _contradictions(config).items()
    ]
    return errors + _overlaps(config)


def _contradictions(config: Config) -> dict[str, str]:
    """Return what contradicts what, by config key."""
    found: dict[str, str] = {}
    if config.is_megatron_base and config.base_megatron_path is None:
        found["base_megatron_path"] = f"backend {config.backend} needs base_megatron_path"
    if not config.is_megatron_base and config.base_hf_path is None:
        found["base_hf_path"] = f"backend {config.backend} needs base_hf_path, the base to merge"
    if config.is_megatron_base and config.base_hf_path is not None:
        found["base_hf_path"] = (
            f"base_megatron_path={config.base_megatron_path} is the base to merge; "
            f"base_hf_path={config.base_hf_path} would be a second one"
        )
    if config.backend == "hf_peft" and config.base_megatron_path is not None:
        found["base_megatron_path"] = (
            f"backend hf_peft would not use base_megatron_path={config.base_megatron_path}"
        )
    if config.export_hf and config.output_hf_path is None:
        found["output_hf_path"] = "export_hf is true but output_hf_path is null"
    if not config.export_hf and config.output_megatron_path is None:
        found["export_hf"] = "export_hf is false and output_megatron_path is null: no output"
    return found


def _overlaps(config: Config) -> list[NemotronError]:
    keys = ("lora_checkpoint", "base_hf_path", "base_megatron_path", "hf_model_path")
    inputs: dict[str, Path] = {key: path for key in keys if (path := getattr(config, key))}
    errors = []
    for key in ("output_hf_path", "output_megatron_path"):
        output: Path | None = getattr(config, key)
        if output is None:
            continue
        try:
            refuse_overlap(output, inputs)
        except NemotronError as error:
            errors.append(step_error(STEP, error.code, error.problem, where=key))
        inputs[key] = output
    return errors
