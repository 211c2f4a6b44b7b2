"""Which of the assistant's turns are trained: what says something, unless its weight is 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron.steps.data_prep.sft_packing.reasoning import FIELDS, Variant
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import Rendered


def trained_turns(rendered: Rendered, variant: Variant, *, stop: str | None) -> Rendered:
    """Return a rendered conversation with the spans that are to be trained.

    That leaves out turns before the last ``num_trained`` ones, turns with the weight 0, and empty
    ones: a model that learns to end its turn at once does so where it should answer.

    Args:
        rendered: The conversation, with a span of each turn.
        variant: What was rendered.
        stop: The token that ends a turn, or None.

    Raises:
        BadRowError: ``spans_not_per_turn``: which span is which turn's cannot be told.
    """
    turns = [message for message in variant.messages if message["role"] == "assistant"]
    behind = 0 if variant.num_trained is None else len(turns) - variant.num_trained
    is_trained = [
        index >= behind and turn.get("weight") != 0 and _says_something(turn)
        for index, turn in enumerate(turns)
    ]
    spans = rendered.spans
    if not all(is_trained):
        flags = _flags_of_spans(spans, turns, is_trained)
        spans = [span for span, flag in zip(spans, flags, strict=True) if flag]
    bare = ("", stop or "")
    spans = [(start, end) for start, end in spans if rendered.text[start:end].strip() not in bare]
    return Rendered(rendered.text, spans)


def _says_something(turn: Mapping[str, Any]) -> bool:
    return bool(turn["content"].strip() or any(turn.get(key) for key in ("tool_calls", *FIELDS)))


def _flags_of_spans(
    spans: Sequence[tuple[int, int]], turns: Sequence[Mapping[str, Any]], flags: Sequence[bool]
) -> Sequence[bool]:
    """Return the flag of each span; a template may mark nothing where a turn says nothing."""
    if len(spans) == len(turns):
        return flags
    said = [flag for turn, flag in zip(turns, flags, strict=True) if _says_something(turn)]
    if len(spans) != len(said):
        detail = f"{len(spans)} marked spans for {len(turns)} turns of the assistant"
        raise BadRowError("spans_not_per_turn", detail)
    return said
