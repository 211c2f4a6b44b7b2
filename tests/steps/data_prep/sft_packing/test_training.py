"""What the packs mean to a model: as if every document were trained on alone.

The readers here are independent: one is written from the contract of Megatron-Bridge's collate, the
other is transformers on conversations that were never packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.gpt import GPTModel
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._training.base_model import load_base_model

TINY = Path(__file__).parents[4] / "steps" / "_tiny"
NUM_ROWS = 40


class Sequence(NamedTuple):
    """One document as a trainer sees it."""

    tokens: list[int]
    labels: list[int]
    loss_mask: list[int]


def read_sequences(packed: Path) -> list[list[Sequence]]:
    """Read rows by the contract: tokens ids[s:e-1], labels ids[s+1:e], mask stored[s:e-1]."""
    rows: list[list[Sequence]] = []
    for file in sorted((packed / "splits" / "train").iterdir()):
        for row in pq.read_table(file).to_pylist():
            ids, mask = row["input_ids"], row["loss_mask"]
            bounds = pairwise([*row["seq_start_id"], len(ids)])
            rows.append(
                [Sequence(ids[s : e - 1], ids[s + 1 : e], mask[s : e - 1]) for s, e in bounds]
            )
    return rows


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return load_base_model(
        AsMegatron(HuggingFaceCheckpoint(TINY / "model")),
        lora=None,
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.fixture
def chats() -> list[dict[str, Any]]:
    lines = (TINY / "chat.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:NUM_ROWS]]


@pytest.fixture
def packed(
    chats: list[dict[str, Any]],
    write_rows: Callable[..., Path],
    run_packing: Callable[..., Path],
) -> Callable[..., Path]:
    def pack(**values: Any) -> Path:
        ratios = {"train_ratio": 1.0, "valid_ratio": 0.0, "test_ratio": 0.0}
        return run_packing(write_rows(chats), tokenizer=str(TINY / "model"), **ratios, **values)

    return pack


@torch.no_grad()
def logits_of(model: GPTModel, row: list[Sequence]) -> list[Tensor]:
    """Return the logits of each document of a row, from one packed forward pass."""
    tokens = torch.tensor([token for item in row for token in item.tokens])
    bounds = [0]
    for item in row:
        bounds.append(bounds[-1] + len(item.tokens))
    logits = model.logits(model(tokens, bounds))
    return [logits[start:stop] for start, stop in pairwise(bounds)]


def loss_of(row: list[Sequence], logits: list[Tensor]) -> tuple[float, int]:
    """Return the sum of the losses of a row and over how many tokens it is."""
    total, count = 0.0, 0
    for item, scores in zip(row, logits, strict=True):
        losses = cross_entropy(scores, torch.tensor(item.labels), reduction="none")
        mask = torch.tensor(item.loss_mask)
        total, count = total + float((losses * mask).sum()), count + int(mask.sum())
    return total, count


@torch.no_grad()
def loss_of_separate_conversations(chats: list[dict[str, Any]]) -> tuple[float, int]:
    """The same from transformers, one conversation at a time, never packed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    total, count = 0.0, 0
    for chat in chats:
        found = tokenizer.apply_chat_template(
            chat["messages"], return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"])
        losses = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, count = total + float((losses * mask[1:]).sum()), count + int(mask[1:].sum())
    return total, count


@pytest.mark.parametrize("pad_seq_to_mult", [1, 8])
def test_the_loss_of_packs_is_the_mean_over_separate_conversations(
    model: GPTModel,
    packed: Callable[..., Path],
    chats: list[dict[str, Any]],
    pad_seq_to_mult: int,
) -> None:
    rows = read_sequences(packed(pad_seq_to_mult=pad_seq_to_mult))
    assert len(rows) < NUM_ROWS / 2
    assert all(len(item.tokens) % pad_seq_to_mult == 0 for row in rows for item in row)
    sums = [loss_of(row, logits_of(model, row)) for row in rows]
    wanted, count = loss_of_separate_conversations(chats)
    assert sum(number for _, number in sums) == count
    # fp32 over a thousand tokens, summed in another order.
    assert sum(total for total, _ in sums) / count == pytest.approx(wanted / count, rel=1e-5)


def test_a_changed_document_moves_no_logit_of_its_neighbours(
    model: GPTModel, packed: Callable[..., Path]
) -> None:
    row = max(read_sequences(packed()), key=len)
    before = logits_of(model, row)
    for number, item in enumerate(row):
        changed = [*row]
        changed[number] = item._replace(tokens=[(token + 1) % 1000 for token in item.tokens])
        after = logits_of(model, changed)
        assert (after[number] - before[number]).abs().max() > 0.1
        for other in set(range(len(row))) - {number}:
            assert torch.equal(after[other], before[other])


def test_the_order_of_documents_in_a_pack_changes_nothing(
    model: GPTModel, packed: Callable[..., Path]
) -> None:
    row = max(read_sequences(packed()), key=len)
    before = logits_of(model, row)
    after = logits_of(model, row[::-1])[::-1]
    for first, second in zip(before, after, strict=True):
        # Another place in the matrix may round otherwise; logits are of size 10.
        assert (first - second).abs().max() < 1e-4
