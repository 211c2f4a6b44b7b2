"""The engines that turn text into token ids: ``tokenizers``, or ``kitoken`` if it proves equal.

``kitoken`` reads the same tokenizer.json and is several times as fast, but with some tokenizers it
differs on rare strings. Therefore it is compared with ``tokenizers`` on ten thousand strings, once
per tokenizer, and later on about every two hundredth piece of the data; after the first difference
it is not used any more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer

# Odd, because prompts and answers alternate and both must be checked.
_CHECK_EVERY = 199


class EngineMismatchError(Exception):
    """``kitoken`` and ``tokenizers`` made different tokens of a text."""


class Encoded(NamedTuple):
    """Tokens of many pieces, one after the other.

    Attributes:
        ids: Token ids, int32.
        lengths: Tokens of each piece, int64.
    """

    ids: np.ndarray
    lengths: np.ndarray


class Engine:
    """Encodes pieces of text with one tokenizer.

    Args:
        tokenizer: The tokenizer.
        name: ``tokenizers`` or ``kitoken``.
    """

    def __init__(self, tokenizer: ChatTokenizer, name: str = "tokenizers") -> None:
        self.name = name
        self._backend = tokenizer.backend
        self._plain: Tokenizer | None = None
        self._fast: Any = None
        if name == "kitoken":
            from kitoken import Kitoken

            self._fast = Kitoken.from_file(str(tokenizer.directory / "tokenizer.json"))

    def encode(self, pieces: list[str], *, plain: AbstractSet[int]) -> Encoded:
        """Return the tokens of all pieces.

        Args:
            pieces: The texts.
            plain: Indices of pieces in which the text of a special token is plain text.

        Raises:
            EngineMismatchError: A piece that was checked has other tokens.
        """
        if self._fast is None:
            encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            found: list[Sequence[int]] = [encoding.ids for encoding in encodings]
        else:
            found = self._fast.encode_all(pieces, True)
            self._check(pieces, found)
        if plain:
            numbers = sorted(plain)
            texts = [pieces[number] for number in numbers]
            encodings = self._without_special().encode_batch_fast(texts, add_special_tokens=False)
            for number, encoding in zip(numbers, encodings, strict=True):
                found[number] = encoding.ids
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        joined = chain.from_iterable(found)
        return Encoded(np.fromiter(joined, dtype=np.int32, count=int(lengths.sum())), lengths)

    def _check(self, pieces: list[str], found: Sequence[Sequence[int]]) -> None:
        sample = list(islice(pieces, 0, None, _CHECK_EVERY))
        wanted = self._backend.encode_batch_fast(sample, add_special_tokens=False)
        for text, ids, encoding in zip(sample, found[::_CHECK_EVERY], wanted, strict=True):
            if list(ids) != encoding.ids:
                raise EngineMismatchError(f"they differ on {text[:80]!r}")

    def _without_special(self) -> Tokenizer:
        """Return the same tokenizer without added tokens, to which their texts are plain text."""
        if self._plain is None:
            content = json.loads(self._backend.to_str())
            content["added_tokens"] = []
            content["post_processor"] = None
            self._plain = Tokenizer.from_str(json.dumps(content))
        return self._plain
