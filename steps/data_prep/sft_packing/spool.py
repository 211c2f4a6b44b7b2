"""Tokenized documents between the two stages: files of flat arrays, sorted by content hash.

A task writes one or more spools. ``KEY-000.tokens`` is int32, with trained tokens stored as their
complement (``~id``), so that ids and mask are one array. ``KEY-000.index`` is a count and two
tables, which are mapped. Both are sorted by the conversations' hashes, so that for a range of
hashes only one range of every file has to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemotron.steps.data_prep.sft_packing.masks import Document
from nemotron.steps.data_prep.sft_packing.receipts import aside

# Tokens that a task holds before it writes a spool: 64 MiB.
MAX_TOKENS = 16 << 20
_BUFFER = 1 << 20


_CONVERSATION = np.dtype(
    [("uid", "<u8"), ("first_document", "<i8"), ("num_documents", "<u4"), ("row", "<u4")]
)
_DOCUMENT = np.dtype([("start", "<i8"), ("length", "<u4"), ("first_trained", "<u4")])
_COUNT = np.dtype("<i8")


class SpoolIndex(NamedTuple):
    """The index of a spool, mapped from its file.

    Attributes:
        conversations: ``uid``, content hash of each, ascending; ``row``, within the part that it
            was read from; ``first_document`` and ``num_documents``, at least 1.
        documents: ``start``, its first token; ``length``, its stored tokens; ``first_trained``,
            index of its first label, at least 1.
    """

    conversations: np.ndarray
    documents: np.ndarray


def map_index(directory: Path, name: str) -> SpoolIndex:
    """Return the index of a spool."""
    held = np.memmap(directory / f"{name}.index", dtype=np.uint8, mode="r")
    count = int(held[: _COUNT.itemsize].view(_COUNT)[0])
    end = _COUNT.itemsize + count * _CONVERSATION.itemsize
    return SpoolIndex(held[_COUNT.itemsize : end].view(_CONVERSATION), held[end:].view(_DOCUMENT))


def map_tokens(directory: Path, name: str) -> np.ndarray:
    """Return the tokens of a spool, int32, complemented where trained, mapped from its file."""
    path = directory / f"{name}.tokens"
    if path.stat().st_size == 0:
        return np.empty(0, np.int32)
    return np.memmap(path, dtype=np.int32, mode="r")


@dataclass
class SpoolWriter:
    """Collects the documents of a task and writes them as spools.

    Attributes:
        directory: Where the spools go.
        key: The task's key, the first part of their names.
        files: Names of the files written so far.
        names: Names of the spools written so far.
    """

    directory: Path
    key: str
    files: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _held: list[tuple[int, int, Sequence[Document]]] = field(default_factory=list)
    _num_tokens: int = 0

    def add(self, documents: Sequence[Document], *, uid: int, row: int) -> None:
        """Add the documents of one conversation."""
        self._held.append((uid, row, documents))
        self._num_tokens += sum(len(document.tokens) for document in documents)
        if self._num_tokens >= MAX_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, if anything is."""
        if not self._held:
            return
        name = f"{self.key}-{len(self.names):03d}"
        held = sorted(self._held, key=itemgetter(0, 1))
        documents = [document for _, _, found in held for document in found]
        with aside(self.directory / f"{name}.tokens") as path, path.open("wb", _BUFFER) as stream:
            stream.writelines(document.tokens.data for document in documents)
        with aside(self.directory / f"{name}.index") as path, path.open("wb") as stream:
            stream.write(np.array(len(held), dtype=_COUNT).tobytes())
            stream.write(_conversations(held).tobytes())
            stream.write(_documents(documents).tobytes())
        self.names.append(name)
        self.files += [f"{name}.tokens", f"{name}.index"]
        self._held, self._num_tokens = [], 0


def _conversations(held: Sequence[tuple[int, int, Sequence[Document]]]) -> np.ndarray:
    table = np.empty(len(held), dtype=_CONVERSATION)
    counts = np.array([len(documents) for _, _, documents in held], dtype=np.int64)
    table["uid"] = [uid for uid, _, _ in held]
    table["row"] = [row for _, row, _ in held]
    table["num_documents"] = counts
    table["first_document"] = np.cumsum(counts) - counts
    return table


def _documents(documents: Sequence[Document]) -> np.ndarray:
    table = np.empty(len(documents), dtype=_DOCUMENT)
    lengths = np.array([len(document.tokens) for document in documents], dtype=np.int64)
    table["start"] = np.cumsum(lengths) - lengths
    table["length"] = lengths
    table["first_trained"] = [document.first_trained for document in documents]
    return table
