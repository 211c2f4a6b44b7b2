"""Entry point of ``data_prep/sft_packing``: conversations to packed Parquet."""

from nemotron.artifacts import Producer, publish
from nemotron.steps._entry import run_step
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.checks import check, datasets_of
from nemotron.steps.data_prep.sft_packing.corpus import read_corpus
from nemotron.steps.data_prep.sft_packing.masks import build_encoder
from nemotron.steps.data_prep.sft_packing.output import format_report, write_packed
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer


def run(config: Config, producer: Producer) -> None:
    """Write the packed_parquet artifact that ``config`` describes."""
    for error in check(config):
        raise error
    options, datasets = config.tokenizer_options, datasets_of(config)
    with publish(config.output_dir) as directory:
        encoder = build_encoder(
            tokenizer=load_tokenizer(options.model),
            chat_template=config.chat_template,
            add_bos=options.add_bos,
            add_eos=options.add_eos,
            max_tokens=config.max_stored_tokens,
        )
        sources = read_corpus(
            datasets,
            encoder=encoder,
            used_in_field=config.used_in_field,
            used_in_filter=config.used_in_filter,
            sample=config.sample,
            sample_seed=config.sample_seed,
            max_bad_fraction=config.max_bad_fraction,
            progress_interval_s=config.observability.pipeline_logging_interval_s,
        )
        properties = write_packed(
            directory,
            sources,
            encoder=encoder,
            produced_by=producer,
            ratios=config.split_ratios,
            shards=config.split_shards,
            pack_size=config.pack_size,
            algorithm=config.algorithm,
            seed=config.packing_seed,
            row_group_size=config.parquet_row_group_size,
            compression=config.parquet_compression,
        )
    print(f"{STEP}: {config.output_dir}\n{format_report(properties)}", flush=True)


def main() -> None:
    """Run the step from its command line."""
    raise SystemExit(run_step(STEP, Config, run))


if __name__ == "__main__":
    main()
