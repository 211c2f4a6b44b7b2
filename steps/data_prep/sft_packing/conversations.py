"""Turns rows of four conventions into conversations, as chat templates read them.

The conventions are OpenAI's (``messages`` of role and content), ShareGPT's (``conversations`` of
from and value), Alpaca's (``instruction``, ``input``, ``output``) and pairs (``prompt``,
``completion``). Rows that say the same have the same messages and the same uid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from nemotron.steps.data_prep.sft_packing.reasoning import FIELDS
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError

ALPACA = "instruction"
SHAREGPT = "conversations"
ALPACA_FIELDS = (ALPACA, "input", "output", "history", "system")
PROMPT, COMPLETION = PAIR_FIELDS = ("prompt", "completion")
DEFAULT_FIELD = "messages"
CALL = "function_call"
# Roles of OpenAI and ShareGPT, in lower case: data of either uses the names of the other as well.
ROLES = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    CALL: "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}

# Fields beside role and content that are part of what a message says; others may differ in copies.
MORE_IDENTITY = ("reasoning_content", "tool_calls", "name", "tool_call_id")


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        messages: As chat templates read them: ``role``, ``content`` (text) and any other fields.
        tools: Tool definitions, or None.
        uid: 64-bit hash of what the messages say; equal conversations have equal uids.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    uid: int


def detect_field(row: Any, *, messages_field: str) -> str | None:
    """Return the field that holds a row's conversation, or None if the row has none.

    A ``messages_field`` other than the default is the only field looked for; the default also finds
    ShareGPT's ``conversations``, Alpaca's ``instruction`` and a ``prompt`` with its ``completion``.
    If a row has several, as in files of two conventions that were joined, one that is not null or
    empty is preferred.
    """
    if not isinstance(row, dict):
        return None
    if messages_field != DEFAULT_FIELD:
        return messages_field if messages_field in row else None
    known = (DEFAULT_FIELD, SHAREGPT, ALPACA, *([PROMPT] if COMPLETION in row else []))
    held = [name for name in known if name in row]
    return max(held, key=lambda name: (bool(row[name]), row[name] is not None), default=None)


def read_conversation(row: Any, *, field: str, tools_field: str) -> Conversation:
    """Return the conversation in the field of a row that ``detect_field`` found.

    Raises:
        BadRowError: The row holds no conversation that can be trained on.
    """
    if not isinstance(row, dict):
        raise BadRowError("not_an_object", f"the row is of type {type(row).__name__}")
    if field not in row:
        raise BadRowError("no_conversation", f"no field {field!r}")
    raw = row[field]
    if field == ALPACA:
        raw = _alpaca_turns(row)
    elif field == PROMPT and COMPLETION in row:
        raw = _pair_turns(row)
    if not isinstance(raw, list) or not raw:
        raise BadRowError("no_conversation", f"{field!r} is not a list of messages")
    messages = [_message(item, index) for index, item in enumerate(raw)]
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        if not isinstance(system, str):
            raise BadRowError("bad_message", "system is not text")
        messages.insert(0, {"role": "system", "content": system})
    _require_answer(messages)
    return Conversation(messages, _tools(row.get(tools_field)), _uid(messages))


def _alpaca_turns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return Alpaca's turns, with the input below the instruction, as LLaMA-Factory joins them."""
    parts = [row.get(name) for name in ("instruction", "input")]
    turns: list[dict[str, Any]] = []
    history = row.get("history") or []
    is_list = isinstance(history, list)
    if not is_list or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRowError("bad_message", "history is not a list of [question, answer]")
    for question, answer in history:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise BadRowError("bad_message", "instruction or input is not text")
    turns.append({"role": "user", "content": "\n".join(part for part in parts if part)})
    turns.append({"role": "assistant", "content": row.get("output")})
    return turns


def _pair_turns(row: Mapping[str, Any]) -> list[Any]:
    """Return the turns of a pair; none of the prompt is trained, as in TRL, whatever its roles."""
    history = [_message(turn, index) for index, turn in enumerate(_turns(row[PROMPT], role="user"))]
    untrained = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in history]
    return [*untrained, *_turns(row[COMPLETION], role="assistant")]


def _turns(said: Any, *, role: str) -> list[Any]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _message(raw: Any, index: int) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRowError("bad_message", f"message {index} is of type {type(raw).__name__}")
    is_sharegpt = "role" not in raw and "from" in raw
    own = ("from", "value") if is_sharegpt else ("role", "content")
    role = raw.get(own[0])
    alias = role.lower() if isinstance(role, str) else ""
    if alias not in ROLES:
        raise BadRowError("unknown_role", f"message {index} has the role {str(role)[:40]!r}")
    if own[1] not in raw and not any(raw.get(name) for name in ("tool_calls", CALL, *FIELDS)):
        raise BadRowError("bad_message", f"message {index} has no field {own[1]!r}")
    content = "" if alias == CALL else _text(raw.get(own[1]), index)
    # Exports give every message every field, but templates ask whether a field is there.
    others = {
        key: value
        for key, value in raw.items()
        if key not in own and value not in (None, "", [], {})
    }
    message: dict[str, Any] = {"role": ROLES[alias], "content": content}
    if not others and alias != CALL:
        return message
    message |= others
    if alias == CALL:
        calls = _parsed(raw.get(own[1]))
        message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    elif message["role"] == "assistant" and CALL in message and "tool_calls" not in message:
        # OpenAI's field before tool_calls; some exports give every message one full of nulls.
        call = _parsed(message.pop(CALL))
        if not isinstance(call, dict) or any(call.values()):
            message["tool_calls"] = [call]
    if message["role"] == "assistant":
        _require_weight(message.get("weight"), index)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], index)
    return _with_reasoning(message)


def _require_weight(weight: Any, index: int) -> None:
    """Refuse a weight other than 0 and 1; OpenAI's weight 0 keeps a turn from being trained."""
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise BadRowError("bad_message", f"weight of message {index} is neither 0 nor 1")


def _text(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRowError("bad_message", f"content of message {index} is not text")
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise BadRowError("not_text", f"message {index} holds parts that are not text")
    return "".join(text for text in texts if text)


def _tool_calls(calls: Any, index: int) -> list[Any]:
    """Return tool calls whose arguments are objects, as chat templates expect, not JSON text."""
    if not isinstance(calls, list) or not calls or not all(isinstance(c, dict) for c in calls):
        raise BadRowError("bad_message", f"tool_calls of message {index} is not a list of objects")
    parsed: list[Any] = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or "name" not in function:
            raise BadRowError("bad_message", f"a tool call of message {index} names no function")
        arguments = function.get("arguments", {})
        function = function | {"arguments": _parsed(arguments)}
        parsed.append({"type": "function"} | call | {"function": function})
    return parsed


def _parsed(text: Any) -> Any:
    """Return JSON in a string as data, anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under both names that templates read.

    Most templates read ``reasoning_content``, some ``thinking``; data sets use three names.
    """
    found = next((message[name] for name in FIELDS if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _require_answer(messages: list[dict[str, Any]]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRowError("no_assistant_turn", "no message has the role assistant")
    keys = ("content", "tool_calls", "reasoning_content")
    said = [answer for answer in answers if any(answer.get(key) for key in keys)]
    if not said:
        raise BadRowError("empty_answer", "the assistant's messages are empty")
    if all(answer.get("weight") == 0 for answer in said):
        raise BadRowError("untrained", "all messages of the assistant have weight 0")


def _tools(value: Any) -> list[Any] | None:
    tools = _parsed(value) or None
    if tools is not None and not isinstance(tools, list):
        raise BadRowError("bad_tools", "the tool definitions are not a list")
    return tools


def _uid(messages: list[dict[str, Any]]) -> int:
    parts: list[str] = []
    for message in messages:
        role, content = message["role"], message["content"]
        more = {key: message[key] for key in MORE_IDENTITY if key in message}
        try:
            rest = json.dumps(more, sort_keys=True) if more else ""
        except TypeError as error:  # Parquet also holds times, decimals and bytes
            raise BadRowError("bad_message", f"a message of the role {role}: {error}") from None
        # With the lengths, so that no text can be taken for the start of the next message.
        parts.append(f"{role} {len(content)} {len(rest)} {content}{rest}")
    said = "".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")
