"""Tests whether ``kitoken`` may replace ``tokenizers``, once per tokenizer, and keeps the verdict.

The trial encodes ten thousand strings with both: contractions, which pre-tokenizers cut by special
rules, runs of blanks and digits, control tokens, and code points of every script and class.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import unicodedata
from pathlib import Path

from nemotron.artifacts import sha256_json, write_text
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer

NUM_STRINGS = 10_000
_VERSION = 1
_WORDS = (
    *("I'm", "it's", "don't", "we'LL", "they'VE", "'text", "''s", "o'clock", "D'Artagnan's"),
    *(
        "hello",
        "World",
        "naïve",
        "Straße",
        "東京",
        "Ещё",
        "مرحبا",
        "สวัสดี",
        "🙂",
        "👩‍👩‍👧",
        "é",
        "ﬁ",
    ),
    *(
        "1",
        "42",
        "3.14",
        "1,000,000",
        "2024-01-31",
        "0x7f",
        "x_1",
        "fooBar",
        "a.b.c",
        "http://x.y/z",
    ),
    *("def", "return", "{", "}", "();", "==", "->", "//", "#", "<think>", "</s>", "[INST]"),
)
_BLANKS = (" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\u00a0", "\u3000", "\u200b", "")


def usable_engine(tokenizer: ChatTokenizer, wanted: str) -> str:
    """Return the engine that is wanted, or ``tokenizers`` if that fails its trial, and say why.

    The verdict is kept below ``XDG_CACHE_HOME``, under a digest of the tokenizer and of both
    packages' versions. If it cannot be written or read, the trial is made again.
    """
    if wanted != "kitoken":
        return "tokenizers"
    try:
        versions = [importlib.metadata.version(name) for name in ("kitoken", "tokenizers")]
    except importlib.metadata.PackageNotFoundError:
        return _fall_back("it is not installed (pip install 'nemotron[fast]')")
    key = sha256_json([tokenizer.blake3, versions, NUM_STRINGS, _VERSION])
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "nemotron" / "engines" / f"{key}.json"
    try:
        problem = json.loads(path.read_bytes())["problem"]
    except (OSError, ValueError, KeyError, TypeError):
        problem = find_difference(tokenizer)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            verdict = {"tokenizer": tokenizer.blake3, "problem": problem}
            write_text(path, json.dumps(verdict) + "\n")
    return _fall_back(problem) if problem else "kitoken"


def find_difference(tokenizer: ChatTokenizer) -> str | None:
    """Return where ``kitoken`` fails or differs from ``tokenizers``; None if it does not."""
    from kitoken import Kitoken

    try:
        fast = Kitoken.from_file(str(tokenizer.directory / "tokenizer.json"))
    except Exception as error:  # kitoken raises bare Exception
        return f"it cannot read this tokenizer: {error}"
    texts = trial_strings(tokenizer.special_tokens)
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    try:
        found = fast.encode_all(texts, True)
    except Exception as error:
        return f"it cannot encode every text: {error}"
    for text, ids, encoding in zip(texts, found, encodings, strict=True):
        if list(ids) != encoding.ids:
            return f"it differs from tokenizers on {text[:80]!r}"
    return None


def trial_strings(special_tokens: tuple[str, ...]) -> list[str]:
    """Return the strings of the trial, the same every time."""
    rng = random.Random(_VERSION)  # noqa: S311 (texts to try, no secret)
    words = [*_WORDS, *special_tokens[:64]]
    assigned = [
        chr(point)
        for point in range(0x110000)
        if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co")
    ]
    strings: list[str] = []
    while len(strings) < NUM_STRINGS:
        parts = rng.choices(words, k=rng.randint(1, 12))
        strings.append("".join(part + rng.choice(_BLANKS) for part in parts))
        strings.append("".join(rng.choices(assigned, k=rng.randint(1, 24))))
        latin = [chr(rng.randint(0, 0x24F)) for _ in range(rng.randint(1, 24))]
        strings.append("".join(latin))
        strings.append(
            "".join(rng.choice((rng.choice(words), rng.choice(assigned))) for _ in parts)
        )
    return strings[:NUM_STRINGS]


def _fall_back(problem: str) -> str:
    print(f"{STEP}: not using kitoken: {problem}", flush=True)
    return "tokenizers"
