"""The tiny world's tokenizer: lossless, of 1,024 tokens, and the one that the corpus gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nemotron.steps import _tiny
from nemotron.steps._tiny.build import build_tokenizer
from nemotron.steps._tiny.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer

MODEL = Path(_tiny.__file__).parent / "model"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
MESSAGES = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "What is the capital of Norway?"},
    {"role": "assistant", "content": "The capital of Norway is Oslo."},
    {"role": "user", "content": "Thank you!"},
    {"role": "assistant", "content": "You are welcome!"},
]


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_survives_encode_and_decode(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token() -> None:
    single = [token for token in TOKENIZER.get_vocab() if len(token) == 1]
    assert len(single) == 256


def test_vocabulary_has_1024_tokens_and_the_specials_come_first() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE == 1024
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


def test_committed_tokenizer_is_what_the_corpus_gives() -> None:
    trained = json.loads(build_tokenizer().to_str())["model"]
    committed = json.loads(TOKENIZER.to_str())["model"]
    assert trained["vocab"] == committed["vocab"]
    assert trained["merges"] == committed["merges"]


def test_train_tokenizer_refuses_texts_with_too_few_words() -> None:
    with pytest.raises(ValueError, match="wanted 1024"):
        train_tokenizer(["one two three"])


def test_transformers_loads_the_special_tokens(hf_tokenizer: Any) -> None:
    specials = (hf_tokenizer.eos_token, hf_tokenizer.pad_token)
    assert specials == ("<|im_end|>", "<|endoftext|>")
    assert len(hf_tokenizer) == VOCAB_SIZE
    text = "Fish swim . Do n't they ?\r\n\t\u00e9<|im_end|>"
    assert hf_tokenizer(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert hf_tokenizer.decode(hf_tokenizer(text)["input_ids"]) == text


def test_chat_template_renders_chatml(hf_tokenizer: Any) -> None:
    prompt = hf_tokenizer.apply_chat_template(
        MESSAGES[:2], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nAnswer.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Norway?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    whole = hf_tokenizer.apply_chat_template(MESSAGES[:3], tokenize=False)
    assert whole == prompt + "The capital of Norway is Oslo.<|im_end|>\n"


def test_chat_template_marks_what_the_assistant_says_and_its_end(hf_tokenizer: Any) -> None:
    encoded = hf_tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    said = [token for token, is_said in pairs if is_said]
    wanted = "The capital of Norway is Oslo.<|im_end|>You are welcome!<|im_end|>"
    assert hf_tokenizer.decode(said) == wanted
