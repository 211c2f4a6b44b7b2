"""Reasoning: kept, stripped, or one document for every turn; and control strings that stay text."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps.data_prep.sft_packing.reasoning import variants
from nemotron.steps.data_prep.sft_packing.sanitizing import Sanitizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>")


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def test_a_conversation_without_reasoning_is_not_split() -> None:
    messages = chat(("user", "Q"), ("assistant", "A"), ("user", "Q"), ("assistant", "A"))
    assert variants(messages, "split_per_turn") == [(messages, None)]


def test_a_turn_is_all_that_follows_a_question_with_tools_and_their_answers() -> None:
    messages = chat(
        ("system", "S"),
        ("user", "Q1"),
        ("assistant", "<think>R</think>call"),
        ("tool", "result"),
        ("assistant", "A1"),
        ("user", "Q2"),
        ("user", "Q2 more"),
        ("assistant", "A2"),
        ("user", "Q3"),
    )
    first, second = variants(messages, "split_per_turn")
    assert first == (messages[:5], 2)
    said = [message["content"] for message in second.messages]
    assert said == ["S", "Q1", "call", "result", "A1", "Q2", "Q2 more", "A2"]
    assert second.num_trained == 1


def test_strip_takes_a_block_whose_opening_tag_the_prompt_wrote() -> None:
    (found,) = variants(
        chat(("user", "<think>Q</think>"), ("assistant", "R\n</think>\n\nA")), "strip"
    )
    assert [message["content"] for message in found.messages] == ["<think>Q</think>", "A"]


texts = st.lists(st.sampled_from([*SPECIAL, "\U0010fffe", "\U0010ffff", "0", "a <", "é"])).map(
    "".join
)


@given(question=texts, answer=texts)
def test_what_is_hidden_comes_back_as_the_same_text_and_only_real_tokens_act(
    question: str, answer: str
) -> None:
    sanitizer = Sanitizer(SPECIAL)
    hidden = sanitizer.hide(chat(("user", question), ("assistant", answer)))
    rendered = f"<|im_start|>{hidden[0]['content']}<|im_end|>"
    parts = sanitizer.cut(rendered)
    assert "".join(text for text, _ in parts) == f"<|im_start|>{question}<|im_end|>"
    acting = [text for text, is_plain in parts if not is_plain and text in SPECIAL]
    assert acting == ["<|im_start|>", "<|im_end|>"]
    said = sanitizer.cut(hidden[1]["content"])  # by the assistant, whose tokens act
    assert "".join(text for text, _ in said) == answer
    assert not any(is_plain for _, is_plain in said)
