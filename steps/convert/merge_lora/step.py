"""Merge a LoRA adapter into its base."""

from __future__ import annotations

from nemotron.artifacts import Producer
from nemotron.steps._entry import run_step
from nemotron.steps.convert.merge_lora.checks import STEP, check
from nemotron.steps.convert.merge_lora.inputs import open_inputs
from nemotron.steps.convert.merge_lora.merge import publish_merged
from nemotron.steps.convert.merge_lora.schema import Config


def run(config: Config, producer: Producer) -> None:
    """Merge the adapter that ``config`` names."""
    for error in check(config):
        raise error
    inputs = open_inputs(
        lora_checkpoint=config.lora_checkpoint,
        base=config.base_megatron_path if config.is_megatron_base else config.base_hf_path,
        is_megatron_base=config.is_megatron_base,
        model_files=config.model_files,
        allow_unverified_base=config.allow_unverified_base,
        allow_unvalidated=config.allow_unvalidated,
    )
    publish_merged(
        inputs,
        output_hf_path=config.output_hf_path if config.export_hf else None,
        output_megatron_path=config.output_megatron_path,
        has_tokenizer=config.save_tokenizer,
        show_progress=config.show_progress,
        debug=config.debug,
        produced_by=producer,
    )


def main() -> None:
    """Run the step from its command line."""
    raise SystemExit(run_step(STEP, Config, run))


if __name__ == "__main__":
    main()
