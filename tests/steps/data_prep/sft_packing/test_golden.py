"""Golden files: what each edge case of chat data must become, written by hand."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from nemotron.steps.data_prep.sft_packing.conversations import read_conversation
from nemotron.steps.data_prep.sft_packing.masks import Document, Encoder, build_encoder
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))


def described(encoder: Encoder, document: Document) -> dict[str, Any]:
    def text(ids: list[int]) -> str:
        return encoder.tokenizer.backend.decode(ids, skip_special_tokens=False)

    pairs = zip(document.ids.tolist(), document.mask.tolist(), strict=True)
    runs = [
        (flag, [token for token, _ in run]) for flag, run in groupby(pairs, lambda pair: pair[1])
    ]
    return {
        "text": text(document.ids.tolist()),
        "trained": [text(ids) for flag, ids in runs if flag],
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_an_edge_case_becomes_what_its_golden_file_says(path: Path, tokenizer_dir: Path) -> None:
    golden = json.loads(path.read_text())
    tokenizer = load_tokenizer(str(tokenizer_dir))
    encoder = build_encoder(
        tokenizer=tokenizer,
        chat_template=golden["template"],
        add_bos=False,
        add_eos=True,
        **golden["options"],
    )
    try:
        conversation = read_conversation(golden["row"], field="messages", tools_field="tools")
        (found,) = encoder.encode([conversation])
    except BadRowError as error:
        found = error
    if isinstance(found, BadRowError):
        assert found.reason == golden.get("reject")
        return
    assert [described(encoder, document) for document in found] == golden["documents"]
    if "special_tokens" in golden:
        special = {tokenizer.backend.token_to_id(text) for text in tokenizer.special_tokens}
        count = sum(token in special for token in found[0].ids.tolist())
        assert count == golden["special_tokens"]
