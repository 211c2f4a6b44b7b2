"""A small tokenizer, conversations and a way to run the step, shared by the tests of this step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from nemotron.artifacts import Producer, read_artifact
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.step import run
from nemotron.steps.data_prep.sft_packing.templates import read_template

TEXT = (
    "the river runs to sea and back again under seven bridges while Anna counts 12 boats, "
    "naïve façade über Straße 東京 🙂 def f(x): return x it's don't\n\tindent   spaces"
)
WORDS = TEXT.split(" ")
VOCAB_SIZE = 320

Row = dict[str, Any]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer directory: byte-level BPE of 320 tokens, ChatML with markers."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"]
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "chat_template": read_template("chatml"),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """Rows of OpenAI messages, different from each other, the same for the same seed."""

    def make(count: int, *, seed: int = 0, max_turns: int = 3, max_words: int = 30) -> list[Row]:
        rng = random.Random(seed)

        def text() -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(1, max_words))).strip() or WORDS[0]

        rows: list[Row] = []
        for number in range(count):
            messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
            for _ in range(rng.randint(1, max_turns)):
                messages.append({"role": "user", "content": f"{number} {text()}"})
                messages.append({"role": "assistant", "content": text()})
            rows.append({"messages": messages})
        return rows

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSONL; a row that is text goes into the file as it is."""

    def write(rows: list[Row | str], name: str = "chat.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def run_packing(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """Run the step with small settings and return its output directory."""

    def run_it(blend_path: Path | str, **overrides: Any) -> Path:
        settings: dict[str, Any] = {
            "blend_path": str(blend_path),
            "output_dir": tmp_path / "packed",
            "tokenizer": str(tokenizer_dir),
            "chat_template": None,
            "pack_size": 256,
            "num_shards": 1,
            "num_workers": 1,
            "train_ratio": 0.8,
            "valid_ratio": 0.1,
            "test_ratio": 0.1,
        }
        config = Config.model_validate(settings | overrides)
        producer = Producer(step="data_prep/sft_packing", config_sha256="0" * 64, code_version="0")
        run(config, producer)
        return Path(config.output_dir)

    return run_it


def properties_of(packed: Path) -> dict[str, Any]:
    """Return what the artifact says of an output."""
    return read_artifact(packed, "packed_parquet").properties


def packed_rows(packed: Path, split: str) -> list[dict[str, list[int]]]:
    """Return the rows of a split, column by column."""
    files = sorted((packed / "splits" / split).iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def documents_of(row: dict[str, list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return tokens and mask of each document of a row."""
    bounds = pairwise([*row["seq_start_id"], len(row["input_ids"])])
    return [
        (tuple(row["input_ids"][start:end]), tuple(row["loss_mask"][start:end]))
        for start, end in bounds
    ]
