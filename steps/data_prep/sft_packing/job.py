"""Plans a run from its config: the tokenizer, the first stage's tasks, the keys of both stages.

The plan is the same on every machine that sees the same config and files, so that the workers of a
job array can plan independently and agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nemotron.artifacts import sha256_json
from nemotron.steps.data_prep.sft_packing.blend import Sources
from nemotron.steps.data_prep.sft_packing.conformance import usable_engine
from nemotron.steps.data_prep.sft_packing.corpus import Source, plan_sources
from nemotron.steps.data_prep.sft_packing.pack_task import PackSettings
from nemotron.steps.data_prep.sft_packing.receipts import code_digest
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.tokenizer import (
    ChatTokenizer,
    load_tokenizer,
    template_text,
)
from nemotron.steps.data_prep.sft_packing.tokenizing import EncoderSettings, encoder_of


@dataclass(frozen=True)
class Workspace:
    """Where the results of tasks are kept: beside the output, on the same file system.

    Attributes:
        root: The directory.
    """

    root: Path

    @property
    def tokens(self) -> Path:
        """Results of the first stage."""
        return self.root / "tokens"

    @property
    def packs(self) -> Path:
        """Results of the second stage."""
        return self.root / "packs"

    def clear(self) -> None:
        """Remove all results; the board stays as long as nodes use it (see ``team.py``)."""
        shutil.rmtree(self.tokens, ignore_errors=True)
        shutil.rmtree(self.packs, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()


@dataclass(frozen=True)
class Job:
    """A planned run.

    Attributes:
        sources: The data sets and the tasks that tokenize them.
        blend: The content of the blend.
        encoder: Settings of the encoder.
        template: Text of the chat template.
        settings: How to pack.
        properties: What the output says about itself, without counts.
        shards: Files of each split.
        has_ratios: Whether ratios say how large the splits are; numbers of shards otherwise.
        ratios: Share of each split; without effect where the blend lists splits.
        pack_key: Digest of everything that the output depends on.
        workspace: Where the results of tasks are.
    """

    sources: tuple[Source, ...]
    blend: Sources
    encoder: EncoderSettings
    template: str
    settings: PackSettings
    properties: Mapping[str, Any]
    shards: Mapping[str, int]
    has_ratios: bool
    ratios: Mapping[str, float]
    pack_key: str
    workspace: Workspace


def workspace_of(output: Path) -> Workspace:
    """Return the work directory of an output."""
    output = output.absolute()
    return Workspace(output.with_name(f".{output.name}.work"))


def plan_job(config: Config, blend: Sources, *, engine: str | None = None) -> Job:
    """Return the plan of a run; every input is read once for its digest.

    Args:
        config: The config.
        blend: Its data sets.
        engine: The engine that encodes text; None for the config's, if that passes its trial.

    Raises:
        NemotronError: As ``load_tokenizer``, ``build_encoder`` and ``plan_sources``.
    """
    tokenizer = load_tokenizer(config.tokenizer_options.model)
    template = template_text(config.chat_template, tokenizer)
    engine = engine or usable_engine(tokenizer, config.tokenization.engine)
    encoder = _encoder_settings(config, tokenizer, template, engine)
    workspace = workspace_of(config.output_dir)
    sources = plan_sources(
        blend.datasets,
        directory=workspace.tokens,
        encoder=encoder,
        used_in_field=config.used_in_field,
        used_in_filter=config.used_in_filter,
    )
    packing = _packing(config, tokenizer, encoder_of(encoder, tokenizer).stop_token_id)
    properties = _properties(config, tokenizer, template)
    # Without the key and without paths, so that equal rows make equal files.
    metadata = {name: str(value) for name, value in properties.items() if name != "tokenizer"}
    properties["pack_key"] = _pack_key(config, blend, sources, [packing, properties])
    return Job(
        sources=tuple(sources),
        blend=blend,
        encoder=encoder,
        template=template,
        settings=PackSettings(**packing, metadata=metadata),
        properties=properties,
        shards=config.split_shards,
        has_ratios=config.has_ratios,
        ratios=config.split_ratios,
        pack_key=properties["pack_key"],
        workspace=workspace,
    )


def _encoder_settings(
    config: Config, tokenizer: ChatTokenizer, template: str, engine: str
) -> EncoderSettings:
    return EncoderSettings(
        tokenizer=str(tokenizer.directory),
        tokenizer_blake3=tokenizer.blake3,
        special_tokens=tuple(tokenizer.variables.items()),
        chat_template=template,
        add_bos=config.tokenizer_options.add_bos,
        add_eos=config.tokenizer_options.add_eos,
        reasoning=config.reasoning,
        sanitize=config.sanitize,
        engine=engine,
        today=datetime.now().date().isoformat() if "strftime_now" in template else None,
    )


def _packing(config: Config, tokenizer: ChatTokenizer, stop_token_id: int | None) -> dict[str, Any]:
    return {
        "pack_size": config.pack_size,
        "algorithm": config.algorithm,
        "seed": config.packing_seed,
        "pad_seq_to_mult": config.pad_seq_to_mult,
        "long_documents": config.long_documents,
        "max_tokens": config.max_stored_tokens,
        "stop_token_id": stop_token_id,
        # EOS, as Megatron-Bridge pads: it finds the end of a document by looking for it.
        "pad_id": tokenizer.eos_token_id,
        "row_group_size": config.parquet_row_group_size,
        "compression": config.parquet_compression,
    }


def _properties(config: Config, tokenizer: ChatTokenizer, template: str) -> dict[str, Any]:
    return {
        "pack_size": config.pack_size,
        "pad_seq_to_mult": config.pad_seq_to_mult,
        "tokenizer": config.tokenizer_options.model,
        "tokenizer_blake3": tokenizer.blake3,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "reasoning": config.reasoning,
        "long_documents": config.long_documents,
        "algorithm": config.algorithm,
        "seed": config.packing_seed,
    }


def _pack_key(
    config: Config, blend: Sources, sources: Sequence[Source], values: Sequence[Any]
) -> str:
    return sha256_json(
        {
            "code": code_digest(),
            "tasks": [[task.key for task in source.tasks] for source in sources],
            "datasets": [
                source.dataset.model_dump() | {"into": source.dataset.into} for source in sources
            ],
            "weight_by": blend.weight_by,
            "sample": [config.sample, config.sample_seed],
            "splits": [config.split_ratios, config.split_shards],
            "max_bad_fraction": config.max_bad_fraction,
            "values": values,
        }
    )
