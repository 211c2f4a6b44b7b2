"""Turns: what is empty, or has the weight 0, is read and not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemotron.steps.data_prep.sft_packing.conversations import read_conversation
from nemotron.steps.data_prep.sft_packing.masks import Document, Encoder, build_encoder
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer

STOP = "<|im_end|>"
PLAIN = (  # without markers
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STOP_OUTSIDE = (  # so that it marks nothing of an empty turn
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
)

LAST_TURN_THINKS = (  # as Qwen3's own: earlier turns are shown without reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3_LIKE = (  # without reasoning, what the turn's last message begins with its others do not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoder_of(directory: Path, template: str, **options: Any) -> Encoder:
    return build_encoder(
        tokenizer=load_tokenizer(str(directory)),
        chat_template=template,
        add_bos=False,
        add_eos=True,
        **options,
    )


def encode(encoder: Encoder, *answers: dict[str, Any]) -> list[Document] | BadRowError:
    messages: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        messages.append({"role": "user", "content": f"question {number}"})
        messages.append({"role": "assistant", **answer})
    row = {"messages": messages}
    (found,) = encoder.encode([read_conversation(row, field="messages", tools_field="tools")])
    return found


def trained(encoder: Encoder, *answers: dict[str, Any]) -> list[str]:
    found = encode(encoder, *answers)
    assert not isinstance(found, BadRowError)
    return said(encoder, found)


def said(encoder: Encoder, documents: list[Document]) -> list[str]:
    decode = encoder.tokenizer.backend.decode
    ids = [document.ids[document.mask.astype(bool)].tolist() for document in documents]
    return [decode(one, skip_special_tokens=False) for one in ids]


@pytest.mark.parametrize("template", ["chatml", PLAIN, STOP_OUTSIDE])
@pytest.mark.parametrize(
    "untrained", [{"content": ""}, {"content": " \n"}, {"content": "b", "weight": 0}]
)
def test_an_empty_turn_and_one_with_the_weight_0_are_not_trained(
    tokenizer_dir: Path, template: str, untrained: dict[str, Any]
) -> None:
    encoder = encoder_of(tokenizer_dir, template)
    good, other = {"content": "c"}, {"content": "d", "weight": 1}
    for answers in ([untrained, good, other], [good, untrained, other], [good, other, untrained]):
        assert trained(encoder, *answers) == [f"c{STOP}d{STOP}"]


def test_a_turn_that_is_not_trained_may_render_otherwise_at_the_end(tokenizer_dir: Path) -> None:
    encoder = encoder_of(tokenizer_dir, LAST_TURN_THINKS)
    answers = {"content": "a", "weight": 0}, {"content": "b", "reasoning_content": "hm"}
    assert trained(encoder, *answers) == [f"<think>\nhm\n</think>\n\nb{STOP}"]


@pytest.mark.parametrize("thoughts", [("hm", "so"), ("hm", ""), ("", "so"), ("", "")])
def test_split_per_turn_trains_a_template_that_shows_earlier_turns_otherwise(
    tokenizer_dir: Path, thoughts: tuple[str, str]
) -> None:
    answers = [
        {"content": content} | ({"reasoning_content": thought} if thought else {})
        for content, thought in zip("ab", thoughts, strict=True)
    ]
    encoder = encoder_of(tokenizer_dir, LAST_TURN_THINKS, reasoning="split_per_turn")
    assert trained(encoder, *answers) == [
        f"<think>\n{thought}\n</think>\n\n{content}{STOP}"
        for content, thought in zip("ab", thoughts, strict=True)
    ]
    found = encode(encoder_of(tokenizer_dir, LAST_TURN_THINKS), *answers)
    assert isinstance(found, BadRowError)
    assert found.reason == "template_not_prefix_stable"
    assert "reasoning=split_per_turn" in found.detail
    assert "chat_template=qwen3" in found.detail


def with_tools(encoder: Encoder, **called: Any) -> list[str] | BadRowError:
    """Return what is trained of [user, assistant(tool_calls), tool, assistant]."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}], **called},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "Sunny."},
    ]
    row = {"messages": messages}
    (found,) = encoder.encode([read_conversation(row, field="messages", tools_field="tools")])
    return found if isinstance(found, BadRowError) else said(encoder, found)


CALLED = '{"name": "look", "arguments": {}}'


@pytest.mark.parametrize("thought", ["", "hm"])
def test_split_per_turn_trains_a_call_and_the_answer_after_it_where_the_last_renders_otherwise(
    tokenizer_dir: Path, thought: str
) -> None:
    encoder = encoder_of(tokenizer_dir, QWEN3_LIKE, reasoning="split_per_turn")
    call, answer = (f"<think>\n{t}\n</think>\n\n" for t in (thought, ""))
    call, answer = f"{call}{CALLED}{STOP}", f"{answer}Sunny.{STOP}"
    # With its reasoning the call renders as it does at the end, and the turn is one document.
    expected = [call + answer] if thought else [call, answer]
    assert with_tools(encoder, reasoning_content=thought) == expected
    assert with_tools(encoder, reasoning_content=thought, weight=0) == [answer]


def test_advice_on_a_template_that_is_not_stable_names_nothing_that_is_set(
    tokenizer_dir: Path,
) -> None:
    found = with_tools(encoder_of(tokenizer_dir, QWEN3_LIKE))
    assert isinstance(found, BadRowError)
    assert found.reason == "template_not_prefix_stable"
    assert "reasoning=split_per_turn" in found.detail
    assert "chat_template=qwen3" in found.detail
    assert not isinstance(with_tools(encoder_of(tokenizer_dir, "qwen3")), BadRowError)
    never = QWEN3_LIKE.replace("{% if add", "{{ '<plan>' if messages | length == 3 }}{% if add")
    found = with_tools(encoder_of(tokenizer_dir, never, reasoning="split_per_turn"))
    assert isinstance(found, BadRowError)
    assert found.reason == "template_not_prefix_stable"
    assert "split_per_turn" not in found.detail
    assert "chat_template=qwen3" in found.detail


def test_a_turn_that_is_not_trained_is_read(tokenizer_dir: Path) -> None:
    encoder = encoder_of(tokenizer_dir, "chatml")
    found = encode(encoder, {"content": "b", "weight": 0}, {"content": "c"})
    assert not isinstance(found, BadRowError)
    text = encoder.tokenizer.backend.decode(found[0].ids.tolist(), skip_special_tokens=False)
    assert f"<|im_start|>assistant\nb{STOP}" in text


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_a_turn_of_which_the_template_leaves_nothing_is_not_trained(
    tokenizer_dir: Path, template: str
) -> None:
    encoder = encoder_of(tokenizer_dir, template)
    stop = encoder.template.stop or ""
    answers = {"content": "", "reasoning_content": "\n"}, {"content": "c"}
    assert trained(encoder, *answers) == [f"c{stop}"]


def test_reasoning_that_is_stripped_leaves_an_empty_turn(tokenizer_dir: Path) -> None:
    encoder = encoder_of(tokenizer_dir, "qwen3", reasoning="strip")
    answers = {"content": "", "reasoning_content": "hm"}, {"content": "c"}
    assert trained(encoder, *answers) == [f"c{STOP}"]


def test_weights_hold_where_every_turn_is_a_document_of_its_own(tokenizer_dir: Path) -> None:
    encoder = encoder_of(tokenizer_dir, "qwen3", reasoning="split_per_turn")
    reasoned = {"content": "c", "reasoning_content": "hm"}
    documents = trained(encoder, {"content": "a"}, reasoned | {"weight": 0}, {"content": "d"})
    assert documents == [f"a{STOP}", f"d{STOP}"]
