"""Rendering: which text is the assistant's, with and without markers in the template."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from nemotron.steps.data_prep.sft_packing.conversations import read_conversation
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import ChatTemplate
from nemotron.steps.data_prep.sft_packing.templates import read_template

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>")
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STOP_OUTSIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
HEADER = "{{ '<|im_start|>' + m.role + '\n\n' }}"
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    + HEADER
    + "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
LLAMA2_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' </s>' }}"
    "{% else %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)

LLAMA31_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if not m.tool_calls | length == 1 %}{{ raise_exception('only single tool-calls') }}"
    "{% endif %}"
    + HEADER
    + "{{ m.tool_calls[0].function | tojson + '<|eot_id|>' }}{% else %}"
    + HEADER
    + "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)


def compiled(text: str) -> ChatTemplate:
    return ChatTemplate(text, variables={"bos_token": "<s>"}, special_tokens=SPECIAL)


def spans(text: str, messages: list[dict[str, Any]] = CHAT) -> list[str]:
    rendered = compiled(text).render(messages)
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("text", [read_template("chatml"), PLAIN_CHATML, STOP_OUTSIDE])
def test_render_trains_each_answer_with_its_end_of_turn_token(text: str) -> None:
    assert compiled(text).stop == "<|im_end|>"
    assert spans(text) == ["A1<|im_end|>", "A2<|im_end|>"]


def test_render_without_markers_finds_answers_of_other_families() -> None:
    assert spans(LLAMA_LIKE) == ["A1<|eot_id|>", "A2<|eot_id|>"]
    assert spans(LLAMA2_LIKE) == [" A1 </s>", " A2 </s>"]


def test_a_template_that_asks_whether_there_are_tool_calls_meets_none_that_are_empty() -> None:
    row = {"messages": [message | {"tool_calls": []} for message in CHAT]}
    conversation = read_conversation(row, field="messages", tools_field="tools")
    assert spans(LLAMA31_LIKE, conversation.messages) == ["A1<|eot_id|>", "A2<|eot_id|>"]


def test_render_keeps_blanks_that_the_template_marks_as_generated() -> None:
    text = STOP_OUTSIDE.replace("{% endgeneration %}", "<|im_end|>\n{% endgeneration %}", 1)
    text = text.replace(
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    )
    assert spans(text) == ["A1<|im_end|>\n", "A2<|im_end|>\n"]


def test_render_refuses_to_guess_when_a_turn_renders_otherwise_at_the_end() -> None:
    text = PLAIN_CHATML.replace(
        "m.content +", "('<think>' if loop.last and m.role == 'assistant' else '') + m.content +"
    )
    assert spans(text, CHAT[:3]) == ["<think>A1<|im_end|>"]
    with pytest.raises(BadRowError, match="message 2") as caught:
        spans(text)
    assert caught.value.reason == "template_not_prefix_stable"


def test_render_refuses_markers_whose_place_cannot_be_known() -> None:
    text = (
        "{% macro say(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    with pytest.raises(BadRowError) as caught:
        compiled(text)
    assert caught.value.reason == "generation_moved"


@pytest.mark.parametrize(
    ("text", "content", "reason"),
    [
        ("{{ raise_exception('no ' + messages[0].role) }}", "Q", "template_error"),
        ("{{ messages[0].content + 1 }}", "Q", "template_error"),
        ("{{ ''.__class__.__mro__ }}", "Q", "template_error"),
        (PLAIN_CHATML, "half \ud800 a pair", "invalid_unicode"),
    ],
)
def test_render_turns_failures_into_reasons(text: str, content: str, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        compiled(text).render([{"role": "user", "content": content}])
    assert caught.value.reason == reason


def test_chat_template_reports_a_syntax_error() -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        compiled("{% if %}")


def test_tojson_leaves_html_and_unicode_as_they_are() -> None:
    text = "{{ messages[0].content | tojson }}"
    rendered = compiled(text).render([{"role": "user", "content": "<é & 'x'>"}])
    assert rendered.text == "\"<é & 'x'>\""


def test_nano3_trains_reasoning_and_answer_but_not_how_the_turn_opens() -> None:
    template = compiled(read_template("nano3"))
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    rendered = template.render(messages)
    said = [rendered.text[start:end] for start, end in rendered.spans]
    assert said == ["R\n</think>\nA<|im_end|>", "R\n</think>\nA<|im_end|>", "A<|im_end|>"]
    assert rendered.text.count("<|im_start|>assistant\n<think>\nR") == 2
    assert "<|im_start|>assistant\n<think></think>A" in rendered.text


def test_nano3_renders_tools_calls_and_joins_their_results() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "wind"},
        {"role": "assistant", "content": "A"},
    ]
    rendered = compiled(read_template("nano3")).render(messages, [{"name": "look"}])
    assert '<tools>\n{"name": "look"}\n</tools>' in rendered.text
    assert rendered.text.count("<|im_start|>user\n") == 2
    assert (
        '{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>' in rendered.trained
    )
    assert "sun" not in rendered.trained
