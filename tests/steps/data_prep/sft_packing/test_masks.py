"""Masks: token for token those of transformers where it is right, and right where it is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer

from nemotron.errors import NemotronError
from nemotron.steps.data_prep.sft_packing.conversations import read_conversation
from nemotron.steps.data_prep.sft_packing.masks import (
    Document,
    Encoder,
    build_encoder,
)
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.templates import bundled_names, read_template
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

NO_STOP = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)


def encoder_of(directory: Path, chat_template: str | None = None, **options: Any) -> Encoder:
    settings: dict[str, Any] = {"add_bos": False, "add_eos": True}
    tokenizer = load_tokenizer(str(directory))
    return build_encoder(tokenizer=tokenizer, chat_template=chat_template, **(settings | options))


def encode(encoder: Encoder, *messages: tuple[str, str]) -> Document:
    rows = {"messages": [{"role": role, "content": text} for role, text in messages]}
    (found,) = encoder.encode([read_conversation(rows, field="messages", tools_field="tools")])
    return only(found)


def only(found: list[Document] | BadRowError) -> Document:
    assert not isinstance(found, BadRowError)
    (document,) = found
    return document


def require_masks_of_transformers(
    encoder: Encoder, directory: Path, template: str, rows: list[dict[str, Any]]
) -> None:
    """Ours ends with the last trained token; up to there both must agree, and train no more."""
    from transformers import AutoTokenizer

    conversations = [read_conversation(row, field="messages", tools_field="-") for row in rows]
    peer = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [conversation.messages for conversation in conversations],
        chat_template=template,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    documents = [only(found) for found in encoder.encode(conversations)]
    for document, ids, mask in zip(
        documents, peer["input_ids"], peer["assistant_masks"], strict=True
    ):
        length = len(document.ids)
        assert document.ids.tolist() == ids[:length]
        assert document.mask.tolist() == mask[:length]
        assert not any(mask[length:])


@pytest.mark.parametrize("name", bundled_names())
def test_encode_agrees_with_transformers(
    tokenizer_dir: Path, make_rows: Callable[..., list[dict[str, Any]]], name: str
) -> None:
    encoder = encoder_of(tokenizer_dir, name)
    assert encoder.encodes_pieces
    require_masks_of_transformers(encoder, tokenizer_dir, read_template(name), make_rows(400))


def test_encode_agrees_with_transformers_for_a_tokenizer_with_a_dummy_prefix(
    tmp_path: Path, tokenizer_dir: Path, make_rows: Callable[..., list[dict[str, Any]]]
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(BPE(unk_token=special[0]))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always")  # pyright: ignore
    rows = make_rows(100)
    texts = [message["content"] for row in rows for message in row["messages"]]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*texts, "system user assistant"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = encoder_of(tmp_path, "chatml")
    assert not encoder.encodes_pieces
    require_masks_of_transformers(encoder, tmp_path, read_template("chatml"), rows)


def test_encode_gives_an_answer_that_begins_with_a_newline_the_tokens_of_inference(
    tokenizer_dir: Path,
) -> None:
    encoder = encoder_of(tokenizer_dir)
    document = encode(encoder, ("user", "Q"), ("assistant", "\n\nA"))
    backend = encoder.tokenizer.backend
    prompt = backend.encode("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n").ids
    assert document.ids[: len(prompt)].tolist() == prompt
    assert document.mask.tolist() == [0] * len(prompt) + [1] * (len(document.ids) - len(prompt))


def test_encode_ends_a_document_with_its_last_trained_token(tokenizer_dir: Path) -> None:
    encoder = encoder_of(tokenizer_dir)
    document = encode(encoder, ("user", "Q"), ("assistant", "A"), ("user", "Q2"))
    assert document.ids[-1] == encoder.tokenizer.eos_token_id
    assert document.mask[-1] == 1
    assert "Q2" not in encoder.tokenizer.backend.decode(document.ids.tolist())


def test_add_bos_and_add_eos_act_only_where_the_template_did_not(tokenizer_dir: Path) -> None:
    turns = (("user", "Q"), ("assistant", "A"))
    bare = encode(encoder_of(tokenizer_dir, NO_STOP, add_eos=False), *turns)
    both = encode(encoder_of(tokenizer_dir, NO_STOP, add_bos=True), *turns)
    tokenizer = load_tokenizer(str(tokenizer_dir))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert both.ids.tolist() == [bos, *bare.ids.tolist(), eos]
    assert both.mask.tolist() == [0, *bare.mask.tolist(), 1]
    chatml = encode(encoder_of(tokenizer_dir), *turns)
    assert (
        chatml.ids.tolist() == encode(encoder_of(tokenizer_dir, add_eos=False), *turns).ids.tolist()
    )


def test_encode_reports_a_row_that_fails_and_keeps_the_others(tokenizer_dir: Path) -> None:
    template = NO_STOP.replace("{{ m.role }}", "{{ m.role + ('' if m.content != 'X' else 1) }}")
    encoder = encoder_of(tokenizer_dir, template)
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]}
        for text in ("Q", "X", "Q")
    ]
    encoded = encoder.encode(
        [read_conversation(row, field="messages", tools_field="-") for row in rows]
    )
    assert [isinstance(item, BadRowError) for item in encoded] == [False, True, False]
    assert np.array_equal(only(encoded[0]).ids, only(encoded[2]).ids)


@pytest.mark.parametrize(
    ("template", "code", "problem"),
    [
        ("{{ messages[0].content }}", "bad_loss_masks", "would train ''"),
        ("{% generation %}{% endgeneration %}{{ messages }}", "bad_loss_masks", "would train ''"),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "bad_loss_masks",
            "would train 'What is asked",
        ),
        ("{% for %}", "bad_chat_template", "Expected an expression"),
        ("{{ raise_exception('needs a system') }}", "bad_chat_template", "needs a system"),
        ("{{ '<|im_start|>' }}<|turn|>{{ '<|turn|>' }}", "tokenizer_mismatch", r"<\|turn\|>, not"),
    ],
)
def test_build_encoder_refuses_a_template_that_cannot_train(
    tokenizer_dir: Path, template: str, code: str, problem: str
) -> None:
    with pytest.raises(NemotronError, match=problem) as caught:
        encoder_of(tokenizer_dir, template)
    assert caught.value.code == code


def test_build_encoder_refuses_add_bos_without_a_bos_token(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(NemotronError, match="no bos_token") as caught:
        encoder_of(tmp_path, add_bos=True)
    assert caught.value.code == "tokenizer_mismatch"
