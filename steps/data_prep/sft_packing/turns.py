"""Decides which turns of the assistant are trained: those that are not empty or of weight 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron.steps.data_prep.sft_packing.reasoning import FIELDS, Messages, Variant
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError

Span = tuple[int, int]


def trained_turns(variant: Variant) -> list[bool]:
    """Return for each message whether it is trained: the assistant's last ``num_trained`` ones.

    Those with the weight 0 are not trained, nor empty ones: a model that learns to end its turn at
    once would do so where it should answer.
    """
    num_trained, messages = variant.num_trained, variant.messages
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    flags = [False] * len(messages)
    for index in turns if num_trained is None else turns[-num_trained:]:
        flags[index] = messages[index].get("weight") != 0 and _says_something(messages[index])
    return flags


def chosen_spans(
    spans: Sequence[Span], messages: Messages, is_trained: Sequence[bool]
) -> Sequence[Span]:
    """Return the spans of the trained turns, given the spans of all turns.

    A template may mark no span for a turn that is empty.

    Raises:
        BadRowError: ``spans_not_per_turn``: which span is which turn's cannot be told.
    """
    pairs = zip(messages, is_trained, strict=True)
    turns = [(message, flag) for message, flag in pairs if message["role"] == "assistant"]
    flags = [flag for _, flag in turns]
    if all(flags) or not any(flags):
        return spans if any(flags) else []
    if len(spans) != len(turns):
        flags = [flag for turn, flag in turns if _says_something(turn)]
    if len(spans) != len(flags):
        detail = f"{len(spans)} marked spans for {len(turns)} turns of the assistant"
        raise BadRowError("spans_not_per_turn", detail)
    return [span for span, flag in zip(spans, flags, strict=True) if flag]


def _says_something(turn: Mapping[str, Any]) -> bool:
    return bool(turn["content"].strip() or any(turn.get(key) for key in ("tool_calls", *FIELDS)))
