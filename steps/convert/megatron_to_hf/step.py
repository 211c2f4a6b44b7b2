"""Convert a Megatron checkpoint to a Hugging Face checkpoint."""

from __future__ import annotations

from nemotron.artifacts import Producer, describe_input, verify_files
from nemotron.steps._entry import run_step, step_error
from nemotron.steps._formats.huggingface_writer import publish_huggingface
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps._formats.weight_files import work_key
from nemotron.steps.convert.megatron_to_hf.checks import STEP, check
from nemotron.steps.convert.megatron_to_hf.model_files import model_files
from nemotron.steps.convert.megatron_to_hf.schema import Config


def run(config: Config, producer: Producer) -> None:
    """Convert the checkpoint that ``config`` names."""
    for error in check(config):
        raise error
    if not config.megatron_path.is_dir():
        problem = f"{config.megatron_path} does not exist"
        raise step_error(STEP, "missing_megatron_checkpoint", problem, where="megatron_path")
    checkpoint = open_megatron(config.megatron_path)
    if checkpoint.artifact is not None:
        verify_files(checkpoint.root, checkpoint.artifact)
    sources = filter(None, [checkpoint.iteration_dir, checkpoint.hf_dir, config.hf_model_path])
    with model_files(checkpoint, config.hf_model_path) as source:
        artifact = publish_huggingface(
            config.output_dir,
            MegatronWeights(checkpoint),
            source=source,
            produced_by=producer,
            inputs=[describe_input("checkpoint_megatron", checkpoint.root)],
            show_progress=config.show_progress,
            resume_key=work_key(producer, sources),
        )
    print(f"{checkpoint.iteration_dir} -> {config.output_dir}")
    print(f"read back and compared; base fingerprint {artifact.properties['base_fingerprint']}")


def main() -> None:
    """Run the step from its command line."""
    raise SystemExit(run_step(STEP, Config, run))


if __name__ == "__main__":
    main()
