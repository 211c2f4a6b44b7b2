"""Convert a Hugging Face checkpoint to a Megatron checkpoint."""

from __future__ import annotations

import sys

from nemotron.artifacts import MANIFEST, Producer, describe_input, read_artifact, verify_files
from nemotron.steps._entry import run_step, step_error
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._formats.megatron_writer import publish_megatron
from nemotron.steps._formats.weight_files import work_key
from nemotron.steps._models.run_config import megatron_would_misread
from nemotron.steps.convert.hf_to_megatron.checks import STEP, check
from nemotron.steps.convert.hf_to_megatron.schema import Config


def run(config: Config, producer: Producer) -> None:
    """Convert the checkpoint that ``config`` names."""
    for error in check(config):
        raise error
    source = config.hf_model_path
    if not source.is_dir():
        raise step_error(STEP, "missing_hf_checkpoint", f"{source} does not exist")
    if (source / MANIFEST).is_file():
        verify_files(source, read_artifact(source, "checkpoint_hf"))
    weights = HuggingFaceCheckpoint(source)
    if megatron_would_misread(weights.config.rope_scaling):
        print(
            "warning: Megatron's constants of Llama 3 rope scaling differ from this model's; it "
            "would compute other logits. The steps here use the constants of hf/config.json",
            file=sys.stderr,
        )
    artifact = publish_megatron(
        config.output_dir,
        weights,
        source=source,
        source_name=str(source.resolve()),
        produced_by=producer,
        inputs=[describe_input("checkpoint_hf", source)],
        resume_key=work_key(producer, [source]),
    )
    fingerprint = artifact.properties["base_fingerprint"]
    print(f"{len(weights.names)} tensors of {source} -> {config.output_dir}")
    print(f"read back and compared; base fingerprint {fingerprint}")


def main() -> None:
    """Run the step from its command line."""
    raise SystemExit(run_step(STEP, Config, run))


if __name__ == "__main__":
    main()
