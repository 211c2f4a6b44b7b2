"""Checks of a config of ``convert/megatron_to_hf`` before it runs."""

from __future__ import annotations

from nemotron.artifacts import refuse_overlap
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.convert.megatron_to_hf.schema import Config

STEP = "convert/megatron_to_hf"


def check(config: Config) -> list[NemotronError]:
    """Return the contradictions in a config."""
    inputs = {"megatron_path": config.megatron_path}
    if config.hf_model_path is not None:
        inputs["hf_model_path"] = config.hf_model_path
    try:
        refuse_overlap(config.output_dir, inputs)
    except NemotronError as error:
        return [step_error(STEP, error.code, error.problem, where="output_dir")]
    return []
