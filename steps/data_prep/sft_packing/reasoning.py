"""What becomes of a model's reasoning: it is kept in every turn, removed, or as at inference.

At inference, most chat templates show a model its earlier answers without the reasoning that led to
them. ``split_per_turn`` trains on exactly that: one document for every turn, with a history without
reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Reasoning = Literal["keep", "strip", "split_per_turn"]
Messages = Sequence[Mapping[str, Any]]

FIELDS = ("reasoning_content", "thinking", "reasoning")
# A block at the start of an answer; in some data the opening tag is missing, as part of the prompt.
_BLOCK = re.compile(r"^\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*", re.DOTALL)


class Variant(NamedTuple):
    """One document to make of a conversation.

    Attributes:
        messages: What it says.
        num_trained: Only this many of the assistant's last messages are trained; None for all.
    """

    messages: Messages
    num_trained: int | None = None


def variants(messages: Messages, policy: Reasoning) -> list[Variant]:
    """Return the documents to make of one conversation; without reasoning it is not split."""
    if policy == "keep" or not any(_has_reasoning(message) for message in messages):
        return [Variant(messages)]
    if policy == "strip":
        return [Variant(without_reasoning(messages))]
    return per_turn(messages)


def per_turn(messages: Messages) -> list[Variant]:
    """Return a document for every turn, its history without reasoning."""
    found: list[Variant] = []
    starts = [0, *_turn_starts(messages)]
    for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
        turn = messages[start:stop]
        num_trained = sum(message["role"] == "assistant" for message in turn)
        if num_trained:
            found.append(Variant([*without_reasoning(messages[:start]), *turn], num_trained))
    return found


def per_answer(variant: Variant) -> list[Variant]:
    """Return a document for each trained message of a turn, which ends with that message.

    For templates that show the last message of a turn differently from tool calls before it.
    """
    messages, num_trained = variant
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers if num_trained is None else answers[-num_trained:]
    return [Variant(messages[: index + 1], 1) for index in chosen]


def without_reasoning(messages: Messages) -> list[Mapping[str, Any]]:
    """Return messages without reasoning, be it in fields or in a block inside the content."""
    return [_without(message) if _has_reasoning(message) else message for message in messages]


def with_reasoning(message: Mapping[str, Any], thought: str) -> Mapping[str, Any] | None:
    """Return a message with its reasoning replaced by ``thought``; None if it has no reasoning."""
    changed = {name: thought for name in FIELDS if _says_something(message.get(name))}
    block = _BLOCK.match(message["content"]) if "</think>" in message["content"] else None
    if block is not None and block[1].strip():
        start, end = block.span(1)
        changed["content"] = message["content"][:start] + thought + message["content"][end:]
    return {**message, **changed} if changed else None


def _says_something(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _turn_starts(messages: Messages) -> list[int]:
    """Return where turns start, but for the first: a user's message after an answer or a tool."""
    return [
        index
        for index in range(1, len(messages))
        if messages[index]["role"] == "user"
        and messages[index - 1]["role"] in ("assistant", "tool")
    ]


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and (
        any(message.get(name) for name in FIELDS) or "</think>" in message["content"]
    )


def _without(message: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in message.items() if name not in FIELDS}
    return rest | {"content": _BLOCK.sub("", message["content"], count=1)}
