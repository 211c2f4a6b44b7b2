"""Control strings that somebody wrote stay text: ``<|im_end|>`` in a question ends no turn.

Before rendering, every special token's text in what others than the assistant say, in whichever
field, is replaced by a placeholder that no template and no text can hold; after rendering, the
pieces with placeholders are encoded as plain text, in which no special token is looked for.
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
        self._texts = [*sorted(special_tokens, key=len, reverse=True), _OPEN, _CLOSE]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        alternatives = "|".join(map(re.escape, self._texts))
        self._any = re.compile(alternatives)
        self._special = re.compile(f"({'|'.join(map(re.escape, self._texts[:-2])) or '(?!)'})")

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return messages with placeholders for control strings outside of the assistant's."""
        return [
            self._hidden(message) if self._is_touched(message) else message for message in messages
        ]

    def hide_tools(self, tools: Sequence[Any] | None) -> Sequence[Any] | None:
        """Return tool definitions with placeholders."""
        return tools if not tools else self._hidden(tools)

    @staticmethod
    def has_placeholder(text: str) -> bool:
        """Return whether a rendered text holds control strings as text."""
        return _OPEN in text

    def cut(self, piece: str) -> list[tuple[str, bool]]:
        """Return a piece as (text, whether it is plain), cut at the real special tokens in it."""
        parts: list[tuple[str, bool]] = []
        for number, part in enumerate(self._special.split(piece)):
            if not part:
                continue
            is_plain = number % 2 == 0 and _OPEN in part
            parts.append((self._shown(part) if is_plain else part, is_plain))
        return parts

    def _is_touched(self, message: Mapping[str, Any]) -> bool:
        if message["role"] == "assistant":
            return False
        # Most messages are a role and a text; what else there is, a template may print as well.
        return len(message) > 2 or bool(self._any.search(message["content"]))

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._any.sub(self._placeholder, value)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item) for item in value]
        return value

    def _placeholder(self, found: re.Match[str]) -> str:
        return f"{_OPEN}{self._numbers[found.group()]}{_CLOSE}"

    def _shown(self, text: str) -> str:
        return _PLACEHOLDER.sub(lambda found: self._texts[int(found.group(1))], text)
