"""What counts as a secret, and how text is shown without it.

Both rules are exact on purpose. A *name* is secret if one of its words says so (``WANDB_API_KEY``
is, ``tokenizer`` and ``pad_token`` are not). A *value* is secret if it has the shape of a known
credential, or is the value of a secret environment variable of this process.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

HIDDEN = "******"

_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|access_?key|private_?key|secret_?key|secret|password|passwd|passphrase"
    r"|credentials?)($|_)"
    # A tokenizer's eos_token and pad_token are no secrets: "token" counts only after these words.
    r"|(^|_)(hf|api|auth|access|bearer|refresh|session|secret|github|gitlab|hub|ngc|wandb)_token$"
    r"|^token$"
)
_SECRET_VALUES = (
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bnvapi-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgithub_pat_[A-Za-z0-9_]{16,}"),
    re.compile(r"\bsk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    # user:password@ in any URL, or a bare token@ over http; ssh://git@host names a login only.
    re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"),
    re.compile(r"(?<=http://)[^/@\s]+(?=@)|(?<=https://)[^/@\s]+(?=@)"),
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")
_SHORTEST_SECRET = 6  # shorter values of secret variables ("1", "none") occur in ordinary text


def is_secret_name(name: str) -> bool:
    """Return whether a config key, option or environment variable is named like a secret."""
    if name.isupper() and name.endswith("_TOKEN"):
        return True
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name.lstrip("-")).replace("-", "_")
    return _SECRET_NAME.search(words.lower()) is not None


def looks_like_secret(value: str, name: str = "") -> bool:
    """Return whether ``value``, which stands under ``name``, has the shape of a credential."""
    if any(pattern.search(value) for pattern in _SECRET_VALUES):
        return True
    named_like_key = is_secret_name(name) or name.lower().endswith("key")
    return named_like_key and _WANDB_KEY.fullmatch(value) is not None


def secret_values(environ: Mapping[str, str], names: Collection[str] = ()) -> frozenset[str]:
    """Return the values of all secret variables of an environment, and of those in ``names``."""
    return frozenset(
        value
        for name, value in environ.items()
        if (name in names or is_secret_name(name)) and len(value) >= _SHORTEST_SECRET
    )


def redact_text(text: str, known: Collection[str] = ()) -> str:
    """Return ``text`` with every known secret value and everything shaped like one hidden."""
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern in _SECRET_VALUES:
        text = pattern.sub(HIDDEN, text)
    return text


def redact_argv(argv: Collection[str], known: Collection[str] = ()) -> list[str]:
    """Return a command line whose secrets are hidden, also in ``--api-key X`` and ``api_key=X``."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide_next:
            shown.append(HIDDEN)
            hide_next = False
        elif equals and is_secret_name(name.rpartition(".")[2]):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redact_text(word, known))
            hide_next = word.startswith("-") and not equals and is_secret_name(word)
    return shown


def redact_data(value: Any, known: Collection[str] = (), *, name: str = "") -> Any:
    """Return a JSON-like value with secrets hidden: strings under secret names, and secret text."""
    if isinstance(value, dict):
        return {key: redact_data(item, known, name=str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_data(item, known, name=name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret_name(name) or looks_like_secret(value, name):
        return HIDDEN
    return redact_text(value, known)
