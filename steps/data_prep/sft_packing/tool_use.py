"""Whether what a conversation says of tools reaches the model: some templates leave it out.

Without its call a turn is empty, and the model would learn to answer with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron.steps.data_prep.sft_packing.conversations import Conversation
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError
from nemotron.steps.data_prep.sft_packing.rendering import ChatTemplate


def require_tools(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse a conversation with tool calls or definitions that its template does not render.

    A function's name may stand in the text by chance, so the conversation is rendered again: with
    other names, each of which must be trained, and without the definitions, which must differ.

    Args:
        template: What rendered it.
        conversation: What was rendered.

    Raises:
        BadRowError: ``tools_not_rendered``.
    """
    messages, tools = conversation.messages, conversation.tools
    if tools and _rendered(template, messages, None) == _rendered(template, messages, tools):
        detail = "the chat template leaves the tool definitions out; choose one that has tools"
        raise BadRowError("tools_not_rendered", detail)
    names: list[str] = []
    renamed = [_renamed(message, names) for message in messages]
    if not names:
        return
    said = _rendered(template, renamed, tools, is_trained=True)
    if said is not None and not all(name in said for name in names):
        detail = "the chat template leaves tool calls out; choose one that has tools"
        raise BadRowError("tools_not_rendered", detail)


def _rendered(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    *,
    is_trained: bool = False,
) -> str | None:
    """Return the text; None where the template objects, so that it does look at the change."""
    try:
        rendered = template.render(messages, tools)
    except BadRowError:
        return None
    return rendered.trained if is_trained else rendered.text


def _renamed(message: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a message whose calls have names of their own, which are added to ``names``."""
    if message["role"] != "assistant" or not message.get("tool_calls"):
        return message
    calls: list[Mapping[str, Any]] = []
    for call in message["tool_calls"]:
        name = {"name": f"nemotron_call_{len(names)}_"}
        names.append(name["name"])
        # Where a call has its name beside the function as well, a template may read either.
        calls.append(
            call | (name if "name" in call else {}) | {"function": call["function"] | name}
        )
    return message | {"tool_calls": calls}
