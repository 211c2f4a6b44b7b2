"""Tools and reasoning: what a template leaves out of a conversation makes it a reject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron.steps.data_prep.sft_packing.conversations import read_conversation
from nemotron.steps.data_prep.sft_packing.masks import build_encoder
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

FIRST_CALL_ONLY = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
CALLS_UNMARKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.tool_calls }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}\n{% endfor %}"
)

LAST_TURN_OTHERWISE = (  # without markers
    "{{ tools | tojson }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}!{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": '{"at": "sky"}'}}


def row(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a conversation that has the letter ``f``, also the assistant's."""
    asked: dict[str, Any] = {"role": "assistant", "content": "fine"}
    if calls:
        asked |= {"tool_calls": list(calls)}
    said = [{"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "of course"}]
    return {"messages": [{"role": "user", "content": "for?"}, asked, *said], **more}


def reject(directory: Path, template: str, row: dict[str, Any], **options: Any) -> str:
    encoder = build_encoder(
        tokenizer=load_tokenizer(str(directory)),
        chat_template=template,
        add_bos=False,
        add_eos=True,
        **options,
    )
    (found,) = encoder.encode([read_conversation(row, field="messages", tools_field="tools")])
    return found.reason if isinstance(found, BadRowError) else ""


@pytest.mark.parametrize(
    ("template", "conversation"),
    [
        ("chatml", row(call("f"))),
        ("chatml", row(tools=[{"type": "function", "function": {"name": "f"}}])),
        (FIRST_CALL_ONLY, row(call("f"), call("f"))),
        (FIRST_CALL_ONLY, row(call("f"), tools=[{"name": "f"}])),
        (CALLS_UNMARKED, row(call("f"))),
    ],
)
def test_a_row_whose_tools_do_not_reach_the_model_is_a_reject(
    tokenizer_dir: Path, template: str, conversation: dict[str, Any]
) -> None:
    assert reject(tokenizer_dir, template, conversation) == "tools_not_rendered"


@pytest.mark.parametrize(
    ("template", "conversation"),
    [
        *((name, row(call("f"), call("f"))) for name in ("llama3", "nano3", "qwen3")),
        *((name, row(call("f"), tools=[call("f")])) for name in ("llama3", "nano3", "qwen3")),
        ("qwen3", row({"name": "f", "arguments": {}})),
        (FIRST_CALL_ONLY, row(call("f"))),
        ("chatml", row()),
    ],
)
def test_a_row_whose_tools_are_rendered_is_kept(
    tokenizer_dir: Path, template: str, conversation: dict[str, Any]
) -> None:
    assert reject(tokenizer_dir, template, conversation) == ""


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LAST_TURN_OTHERWISE, ""),
        (LAST_TURN_OTHERWISE.replace("{{ tools | tojson }}", ""), "tools_not_rendered"),
        (LAST_TURN_OTHERWISE.replace("m.tool_calls | tojson", "1"), "tools_not_rendered"),
    ],
)
def test_tools_are_looked_for_where_turns_are_split_because_the_last_renders_otherwise(
    tokenizer_dir: Path, template: str, reason: str
) -> None:
    """Of each turn the message after the tool's answer is trained alone."""
    messages = [*row(call("f"))["messages"], *row()["messages"]]
    messages[1] |= {"weight": 0}
    messages[5] |= {"weight": 0}
    conversation = {"messages": messages, "tools": [{"name": "look"}]}
    found = reject(tokenizer_dir, template, conversation, reasoning="split_per_turn")
    assert found == reason


LAST_THOUGHT_ONLY = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.thinking if loop.last }}{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
LONG = "The question is short, so that the answer can be short as well."


def thoughtful(*thoughts: str, is_inline: bool = False, **more: Any) -> dict[str, Any]:
    """Return a conversation that also asks what every turn thinks."""
    messages: list[dict[str, Any]] = []
    for thought in thoughts:
        messages.append({"role": "user", "content": thought})
        said = {"content": f"<think>\n{thought}\n</think>\n\nA"} if is_inline else {"content": "A"}
        messages.append({"role": "assistant", "reasoning_content": thought, **said, **more})
        if is_inline:
            del messages[-1]["reasoning_content"]
    return {"messages": messages}


@pytest.mark.parametrize("thought", ["hm", LONG])
@pytest.mark.parametrize("template", ["chatml", "llama3", LAST_THOUGHT_ONLY])
def test_a_row_whose_reasoning_does_not_reach_the_model_is_a_reject(
    tokenizer_dir: Path, template: str, thought: str
) -> None:
    conversation = thoughtful(thought, thought)
    assert reject(tokenizer_dir, template, conversation) == "reasoning_not_rendered"
    assert reject(tokenizer_dir, template, conversation, reasoning="strip") == ""


def test_reasoning_inside_the_content_is_looked_for_too(tokenizer_dir: Path) -> None:
    conversation = thoughtful(LONG, is_inline=True)
    assert reject(tokenizer_dir, LAST_THOUGHT_ONLY, conversation) == "reasoning_not_rendered"


@pytest.mark.parametrize("thought", ["hm", LONG, "\n"])
@pytest.mark.parametrize(
    ("template", "options"),
    [
        ("nano3", {}),
        ("nano3", {"is_inline": True}),
        ("qwen3", {}),
        ("qwen3", {"is_inline": True}),
        ("chatml", {"is_inline": True}),
    ],
)
def test_a_row_whose_reasoning_is_rendered_is_kept(
    tokenizer_dir: Path, template: str, options: dict[str, Any], thought: str
) -> None:
    assert reject(tokenizer_dir, template, thoughtful(thought, thought, **options)) == ""


def test_reasoning_of_turns_that_are_not_trained_may_be_left_out(tokenizer_dir: Path) -> None:
    conversation = thoughtful(LONG, "hm")
    options = {"reasoning": "split_per_turn"}
    assert reject(tokenizer_dir, LAST_THOUGHT_ONLY, conversation, **options) == ""
    conversation["messages"][1] |= {"weight": 0}
    assert reject(tokenizer_dir, LAST_THOUGHT_ONLY, conversation) == ""
