"""Entry point of ``data_prep/sft_packing``: conversations to packed Parquet."""

from nemotron.artifacts import Producer
from nemotron.steps._entry import run_step
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.checks import check
from nemotron.steps.data_prep.sft_packing.output import format_report
from nemotron.steps.data_prep.sft_packing.run import pack_conversations
from nemotron.steps.data_prep.sft_packing.schema import Config


def run(config: Config, producer: Producer) -> None:
    """Write the packed_parquet artifact that ``config`` describes."""
    for error in check(config):
        raise error
    properties = pack_conversations(config, producer)
    if properties is not None:
        print(f"{STEP}: {config.output_dir}\n{format_report(properties)}", flush=True)


def main() -> None:
    """Run the step from its command line."""
    raise SystemExit(run_step(STEP, Config, run))


if __name__ == "__main__":
    main()
