"""Tokenized documents between the two stages: files of flat arrays, sorted by content hash.

A task writes one or more spools. ``KEY-000.tokens`` is int32, a trained token stored as its
complement (``~id``), so that ids and mask are one array. ``KEY-000.npz`` is the index. They are
sorted by the conversations' hashes: whoever wants a range of hashes reads one range of every file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemotron.steps.data_prep.sft_packing.masks import Document
from nemotron.steps.data_prep.sft_packing.receipts import aside

# 64 MiB of tokens: what a task holds before it writes.
MAX_TOKENS = 16 << 20


@dataclass(frozen=True)
class SpoolIndex:
    """What a spool holds.

    Attributes:
        uids: Content hash of each conversation, uint64, ascending.
        rows: Its row within the part it was read from, uint32.
        num_documents: Documents made of it, uint32; at least 1.
        lengths: Stored tokens of each document, uint32.
        first_trained: Index of each document's first label, uint32; at least 1.
    """

    uids: np.ndarray
    rows: np.ndarray
    num_documents: np.ndarray
    lengths: np.ndarray
    first_trained: np.ndarray


def read_index(directory: Path, name: str) -> SpoolIndex:
    """Return the index of a spool."""
    with np.load(directory / f"{name}.npz") as arrays:
        return SpoolIndex(**arrays)


def map_tokens(directory: Path, name: str) -> np.ndarray:
    """Return the tokens of a spool, int32, complemented where trained; read as they are used."""
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
    _held: list[tuple[int, int, list[np.ndarray], list[int]]] = field(default_factory=list)
    _num_tokens: int = 0

    def add(self, documents: Sequence[Document], *, uid: int, row: int) -> None:
        """Add the documents of one conversation."""
        tokens: list[np.ndarray] = []
        first_trained: list[int] = []
        for ids, mask in documents:
            tokens.append(np.where(mask, ~ids, ids))
            first_trained.append(int(mask[1:].argmax()) + 1)
            self._num_tokens += len(ids)
        self._held.append((uid, row, tokens, first_trained))
        if self._num_tokens >= MAX_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what is held, if anything is."""
        if not self._held:
            return
        name = f"{self.key}-{len(self.names):03d}"
        held = sorted(self._held, key=lambda item: item[:2])
        documents = [tokens for _, _, of_conversation, _ in held for tokens in of_conversation]
        index = {
            "uids": np.array([uid for uid, *_ in held], dtype=np.uint64),
            "rows": np.array([row for _, row, *_ in held], dtype=np.uint32),
            "num_documents": np.array([len(item[2]) for item in held], dtype=np.uint32),
            "lengths": np.array([len(tokens) for tokens in documents], dtype=np.uint32),
            "first_trained": np.array([at for item in held for at in item[3]], dtype=np.uint32),
        }
        tokens = np.concatenate(documents).astype(np.int32, copy=False)
        with aside(self.directory / f"{name}.tokens") as path, path.open("wb") as stream:
            stream.write(tokens.data)  # ndarray.tofile would hide why it failed
        with aside(self.directory / f"{name}.npz") as path, path.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **index)
        self.names.append(name)
        self.files += [f"{name}.tokens", f"{name}.npz"]
        self._held, self._num_tokens = [], 0
