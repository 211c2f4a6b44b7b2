"""Keeps control strings in users' text plain text: ``<|im_end|>`` in a question ends no turn.

Before rendering, the text of every special token is replaced by a placeholder, in all fields of all
messages but the assistant's. No template and no text can contain a placeholder. After rendering,
the pieces with placeholders are encoded as plain text, in which no special token is recognised. The
character that starts a placeholder is itself replaced by one, in the assistant's messages as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Noncharacters: valid in a string, reserved for use inside a program.
_OPEN, _CLOSE = "\U0010fffe", "\U0010ffff"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class Sanitizer:
    """Hides the texts of special tokens from the tokenizer.

    Args:
        special_tokens: Their texts.
    """

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self._texts = [*sorted(special_tokens, key=len, reverse=True), _OPEN]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._any = re.compile("|".join(map(re.escape, self._texts)))
        self._open = re.compile(_OPEN)
        self._special = re.compile(f"({'|'.join(map(re.escape, self._texts[:-1])) or '(?!)'})")

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return messages with placeholders for control strings, except in the assistant's."""
        return [self._hidden_message(message) for message in messages]

    def hide_tools(self, tools: Sequence[Any] | None) -> Sequence[Any] | None:
        """Return tool definitions with placeholders."""
        return tools if not tools else self._hidden(tools, self._any)

    @staticmethod
    def has_placeholder(text: str) -> bool:
        """Return whether a rendered text holds control strings as text."""
        return _OPEN in text

    def cut(self, piece: str) -> list[tuple[str, bool]]:
        """Return a piece as (text, whether it is plain), cut at the real special tokens in it."""
        parts: list[tuple[str, bool]] = []
        for part in self._special.split(piece):
            if part:
                shown = self._shown(part)
                parts.append((shown, shown != part and bool(self._special.search(shown))))
        return parts

    def _hidden_message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        texts = self._open if message["role"] == "assistant" else self._any
        # Most messages are a role and a text; a template may print any other field as well.
        is_touched = len(message) > 2 or texts.search(message["content"])
        return self._hidden(message, texts) if is_touched else message

    def _hidden(self, value: Any, texts: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return texts.sub(self._placeholder, value)
        if isinstance(value, Mapping):
            items = value.items()
            return {self._hidden(key, texts): self._hidden(item, texts) for key, item in items}
        if isinstance(value, list | tuple):
            return [self._hidden(item, texts) for item in value]
        return value

    def _placeholder(self, found: re.Match[str]) -> str:
        return f"{_OPEN}{self._numbers[found.group()]}{_CLOSE}"

    def _shown(self, text: str) -> str:
        return _PLACEHOLDER.sub(lambda found: self._texts[int(found.group(1))], text)
