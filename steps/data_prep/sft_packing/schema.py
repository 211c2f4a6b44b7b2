"""The config of ``data_prep/sft_packing``: every key, its type, its default and what it does.

Keys that upstream's Ray engine reads and that mean nothing here are accepted, so that its configs
keep working; each says so. A value that asks for something this step does not do is refused.
The launcher reads this module, so it imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from nemotron.config import Schema

Algorithm = Literal[
    "shuffle_fill",
    "first_fit_shuffle",
    "first_fit_decreasing",
    "best_fit_decreasing",
    "concatenative",
]


class TokenizerConfig(Schema):
    """The tokenizer of the model to train."""

    model: str = Field(description="Hugging Face directory or repository id")
    type: Literal["huggingface"] = "huggingface"
    add_bos: bool = Field(default=False, description="add the BOS token if the template does not")
    add_eos: bool = Field(
        default=True,
        description="end a document with the EOS token if the template ends turns without one",
    )
    trust_remote_code: Literal[False] = Field(
        default=False, description="code from a repository is never run"
    )


class PlanConfig(Schema):
    """Accepted for upstream's configs; without effect, one process plans the run."""

    planner_cpus: float = 0.5


class DownloadConfig(Schema):
    """Accepted for upstream's configs; without effect, huggingface_hub fetches as it is set up."""

    batch_size: int = 1
    stage_cpus: float = 0.5
    hf_xet_high_performance: bool = True
    hf_xet_concurrent_range_gets: int = 32
    max_retries: int = 3
    timeout_sec: int = 300


class TokenizationConfig(Schema):
    """What encodes text; ``cpus_per_worker`` is accepted for upstream's configs without effect."""

    engine: Literal["tokenizers", "kitoken"] = Field(
        default="tokenizers",
        description="kitoken is faster; used only if a trial gives the same tokens as tokenizers",
    )
    cpus_per_worker: float = 1.0


class ObservabilityConfig(Schema):
    """How often the run says how far it is; the ``wandb_*`` keys are accepted without effect."""

    pipeline_logging_interval_s: float = Field(
        default=5.0, gt=0, description="seconds between progress lines"
    )
    wandb_log_pipeline_stats: bool = False
    wandb_log_downloads: bool = False
    wandb_download_log_interval_sec: int = 30


class Config(Schema):
    """Config of ``data_prep/sft_packing``."""

    blend_path: str = Field(
        description="conversations (.jsonl or .json file, directory or glob) or a blend file"
    )
    output_dir: Path = Field(description="directory of the packed_parquet artifact")
    config_name: str = Field(
        default="default", description="a name for your own use; has no effect"
    )

    tokenizer: TokenizerConfig | str = Field(
        description="a Hugging Face directory or repository id, or a mapping with more options"
    )
    chat_template: str | None = Field(
        default="nano3",
        description="chatml, llama3, nano3, qwen3, a template file, inline template text; "
        "null: the tokenizer's",
    )
    reasoning: Literal["keep", "strip", "split_per_turn"] = Field(
        default="keep",
        description="keep or strip all reasoning, or make one document per turn as at inference",
    )
    sanitize: bool = Field(
        default=True,
        description="encode control strings such as <|im_end|> as plain text, except in the "
        "assistant's messages",
    )
    messages_field: str = Field(
        default="messages",
        description="field of a conversation; the default also finds ShareGPT and Alpaca rows and "
        "pairs of prompt and completion",
    )
    tools_field: str = Field(default="tools", description="field of the tool definitions")

    used_in_filter: str | None = Field(
        default=None, description="keep only rows whose used_in_field names this"
    )
    used_in_field: str = "used_in"
    max_rows: int | None = Field(
        default=None,
        ge=1,
        description="at most this many conversations of each dataset, chosen by hash before they "
        "are rendered",
    )
    sample: str | None = Field(
        default=None,
        pattern=r"^(100|\d{1,2})(\.\d+)?%$",
        description="share of each dataset's documents, such as 10%",
    )
    sample_seed: int = Field(default=42, ge=0, description="decides which documents sample takes")
    max_bad_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest share of a dataset's rows that may be unusable; above it the run ends "
        "with an error. Rows that used_in_filter leaves out do not count; with max_rows, the share "
        "is estimated from the rows that were chosen",
    )

    pack_size: int = Field(default=4096, ge=2, description="tokens per row at training time")
    pad_seq_to_mult: int = Field(
        default=1,
        ge=1,
        description="pad documents to a multiple of this: 2 x CP, or CP x TP with sequence "
        "parallelism",
    )
    algorithm: Algorithm = "shuffle_fill"
    long_documents: Literal["truncate_turn", "truncate", "drop", "split", "error"] = Field(
        default="truncate_turn", description="how to treat documents longer than pack_size"
    )
    max_doc_tokens: int | None = Field(
        default=None, ge=2, description="stored tokens of a document, at most pack_size + 1"
    )
    seed: int | None = Field(default=None, ge=0, description="seed of packing; null: sample_seed")

    train_ratio: float = Field(default=0.98, ge=0, le=1)
    valid_ratio: float = Field(default=0.01, ge=0, le=1)
    test_ratio: float = Field(default=0.01, ge=0, le=1)
    num_shards: int = Field(default=128, ge=1, description="files of the train split")
    valid_shards: int | None = Field(
        default=None, ge=0, description="with test_shards: number of shards, instead of the ratios"
    )
    test_shards: int | None = Field(default=None, ge=0)

    dtype: Literal["int32"] = Field(default="int32", description="type of the stored input_ids")
    parquet_row_group_size: int = Field(default=64, ge=1, description="rows of a row group")
    parquet_compression: Literal["zstd", "snappy", "none"] = "zstd"

    force: bool = Field(default=False, description="do everything again, even what is already done")
    keep_tokens: bool = Field(
        default=True,
        description="keep tokenized documents beside output_dir, so that packing them again with "
        "other settings needs no tokenizing",
    )
    num_workers: int | None = Field(
        default=None, ge=1, description="number of processes; null: one per available core"
    )
    execution_mode: Literal["auto", "ray"] = Field(
        default="auto",
        description="processes on each node, or Ray (the job's nodes, RAY_ADDRESS, or local)",
    )
    plan: PlanConfig = PlanConfig()
    download: DownloadConfig = DownloadConfig()
    tokenization: TokenizationConfig = TokenizationConfig()
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pack_size % self.pad_seq_to_mult:
            raise ValueError(
                f"pack_size {self.pack_size} is not a multiple of pad_seq_to_mult "
                f"{self.pad_seq_to_mult}"
            )
        if self.has_ratios:
            total = self.train_ratio + self.valid_ratio + self.test_ratio
            if abs(total - 1.0) > 1e-6:
                raise ValueError(
                    f"train_ratio + valid_ratio + test_ratio is {total:.6g}; must be 1"
                )
        elif self.split_shards["train"] < 1:
            raise ValueError(
                f"valid_shards {self.valid_shards} and test_shards {self.test_shards} leave no "
                f"shard of num_shards {self.num_shards} to the train split"
            )
        return self

    @property
    def tokenizer_options(self) -> TokenizerConfig:
        """The tokenizer as a mapping, whichever way it was given."""
        if isinstance(self.tokenizer, str):
            return TokenizerConfig(model=self.tokenizer)
        return self.tokenizer

    @property
    def has_ratios(self) -> bool:
        """Whether ratios say how large the splits are; numbers of shards otherwise."""
        return self.valid_shards is None and self.test_shards is None

    @property
    def split_shards(self) -> dict[str, int]:
        """Files of each split that is not empty."""
        if self.has_ratios:
            return {"train": self.num_shards, "valid": 1, "test": 1}
        valid, test = self.valid_shards or 0, self.test_shards or 0
        return {"train": self.num_shards - valid - test, "valid": valid, "test": test}

    @property
    def split_ratios(self) -> dict[str, float]:
        """Share of the documents in each split, in [0, 1]."""
        if self.has_ratios:
            return {"train": self.train_ratio, "valid": self.valid_ratio, "test": self.test_ratio}
        return {name: shards / self.num_shards for name, shards in self.split_shards.items()}

    @property
    def max_stored_tokens(self) -> int:
        """Longest document, stored tokens: training drops the last token, hence the + 1."""
        return min(self.pack_size + 1, self.max_doc_tokens or self.pack_size + 1)

    @property
    def packing_seed(self) -> int:
        """The seed of packing: ``seed``, or ``sample_seed`` where that is null."""
        return self.sample_seed if self.seed is None else self.seed
