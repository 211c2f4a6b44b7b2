"""Refuses conversations of which the chat template would leave out tools or reasoning.

If its call is left out, a turn is empty, and the model would learn to answer with nothing; without
the reasoning that led to an answer, it would learn to answer without reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron.steps.data_prep.sft_packing.reasoning import Messages, with_reasoning
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import ChatTemplate, Rendered


def require_definitions(
    template: ChatTemplate, messages: Messages, tools: Sequence[Any] | None
) -> None:
    """Refuse tool definitions if the conversation renders to the same text without them.

    Raises:
        BadRowError: ``tools_not_rendered``.
    """
    if not tools:
        return
    nothing = [False] * len(messages)
    without = _rendered(template, messages, None, nothing)
    if without is not None and without == _rendered(template, messages, tools, nothing):
        detail = "the chat template leaves out the tool definitions; choose one that supports tools"
        raise BadRowError("tools_not_rendered", detail)


def require_calls(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Any] | None,
    is_trained: Sequence[bool],
) -> None:
    """Refuse tool calls that a template does not render, or does not train in a trained turn.

    A function's name may be in the text by chance, so the calls are rendered with other names.

    Args:
        template: The template.
        messages: The conversation.
        tools: Tool definitions, or None.
        is_trained: See ``turns.trained_turns``.

    Raises:
        BadRowError: ``tools_not_rendered``.
    """
    names: dict[str, bool] = {}
    pairs = zip(messages, is_trained, strict=True)
    renamed = [_renamed(message, names, is_trained=flag) for message, flag in pairs]
    rendered = _rendered(template, renamed, tools, is_trained) if names else None
    if rendered is None:
        return
    text, said = rendered.text, rendered.trained
    if not all(name in (said if flag else text) for name, flag in names.items()):
        detail = "the chat template leaves out tool calls; choose one that supports tools"
        raise BadRowError("tools_not_rendered", detail)


def require_reasoning(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Any] | None,
    is_trained: Sequence[bool],
) -> None:
    """Refuse reasoning of a trained turn that a template does not render.

    The same words may be in the text by chance, as in the question, so other words are rendered in
    their place. Whether the reasoning is trained is up to the template.

    Args:
        template: The template.
        messages: The conversation.
        tools: Tool definitions, or None.
        is_trained: See ``turns.trained_turns``.

    Raises:
        BadRowError: ``reasoning_not_rendered``.
    """
    words: dict[str, int] = {}
    changed = list(messages)
    for index, message in enumerate(messages):
        word = f"nemotron_thought_{index}_"
        other = with_reasoning(message, word) if is_trained[index] else None
        if other is not None:
            changed[index], words[word] = other, index
    rendered = _rendered(template, changed, tools, [False] * len(changed)) if words else None
    if rendered is None:
        return
    lost = [index for word, index in words.items() if word not in rendered.text]
    if lost:
        detail = (
            f"the chat template leaves out the reasoning of message {lost[0]}; choose one that "
            "supports reasoning, set reasoning=split_per_turn if it shows that of the last turn, "
            "or reasoning=strip to train without it"
        )
        raise BadRowError("reasoning_not_rendered", detail)


def _rendered(
    template: ChatTemplate,
    messages: Messages,
    tools: Sequence[Any] | None,
    is_trained: Sequence[bool],
) -> Rendered | None:
    """Return a rendered conversation; None if the template refuses it, so it reads what changed."""
    try:
        return template.render(messages, tools, is_trained=is_trained)
    except BadRowError:
        return None


def _renamed(
    message: Mapping[str, Any], names: dict[str, bool], *, is_trained: bool
) -> Mapping[str, Any]:
    """Return a message whose calls have new, unique names, which are added to ``names``."""
    if message["role"] != "assistant" or not message.get("tool_calls"):
        return message
    calls: list[Mapping[str, Any]] = []
    for call in message["tool_calls"]:
        name = f"nemotron_call_{len(names)}_"
        names[name] = is_trained
        # If a call also has its name beside the function, a template may read either.
        beside = {"name": name} if "name" in call else {}
        calls.append(call | beside | {"function": call["function"] | {"name": name}})
    return {**message, "tool_calls": calls}
