"""Finds the text of a chat template: by bundled name, in a file, or inline in the config.

The launcher's checks import this module, so it stays light: nothing is rendered here.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP

BUNDLED_ROOT = Path(__file__).parent / "chat_templates"


def bundled_names() -> list[str]:
    """Return the names that ``chat_template`` takes without a file."""
    return sorted(path.stem for path in BUNDLED_ROOT.glob("*.jinja"))


def read_template(chat_template: str) -> str:
    """Return the text of a template given by bundled name, as inline text or as a file.

    Raises:
        NemotronError: ``bad_chat_template``: it is none of the three.
    """
    if chat_template in bundled_names():
        return (BUNDLED_ROOT / f"{chat_template}.jinja").read_text(encoding="utf-8")
    if is_inline(chat_template):
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise unknown_template(chat_template)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise step_error(STEP, "bad_chat_template", "not UTF-8 text", where=str(path)) from None
    if not is_inline(text):
        # Constant text would give every conversation the same tokens and none to train on.
        problem = f"{path} contains no {{{{ or {{% and so is not a template"
        raise step_error(STEP, "bad_chat_template", problem, where=str(path))
    return text


def is_inline(chat_template: str) -> bool:
    """Return whether a text is a template by itself."""
    return "{{" in chat_template or "{%" in chat_template


def unknown_template(chat_template: str) -> NemotronError:
    """Return the error for a value that is neither a bundled name nor a file nor template text."""
    names = bundled_names()
    close = difflib.get_close_matches(chat_template, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    problem = (
        f"{chat_template!r} is neither a bundled template ({', '.join(names)}) nor a file{hint}"
    )
    return step_error(STEP, "bad_chat_template", problem, where="chat_template")
