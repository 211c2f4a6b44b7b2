"""Checks of a config of ``convert/hf_to_megatron`` before it runs."""

from __future__ import annotations

from nemotron.artifacts import refuse_overlap
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.convert.hf_to_megatron.schema import Config

STEP = "convert/hf_to_megatron"


def check(config: Config) -> list[NemotronError]:
    """Return the contradictions in a config."""
    try:
        refuse_overlap(config.output_dir, {"hf_model_path": config.hf_model_path})
    except NemotronError as error:
        return [step_error(STEP, error.code, error.problem, where="output_dir")]
    return []
