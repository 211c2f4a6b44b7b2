"""Text as HTML that is well-formed XML too, whatever characters a config or a message has."""

from __future__ import annotations

import html
import re

# No XML document may have them, not even escaped; nor can UTF-8 spell the surrogates among them.
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: str) -> str:
    """Return ``text`` for an element or an attribute; a forbidden character as Python spells it."""
    return html.escape(_FORBIDDEN.sub(_spelled, text))


def _spelled(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()
