"""Escapes text for HTML that is also well-formed XML, whatever characters it contains."""

from __future__ import annotations

import html
import re

# XML forbids these, even escaped; and UTF-8 cannot encode the surrogates among them.
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: str) -> str:
    """Escape ``text`` for an element or attribute; forbidden characters become Python escapes."""
    return html.escape(_FORBIDDEN.sub(_spelled, text))


def _spelled(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()
