"""Digests: BLAKE3 of files and their pieces, sha256 of what is short."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

_NUM_THREADS = min(8, os.cpu_count() or 1)  # for hashing: BLAKE3 releases Python's lock
_BLOCK_BYTES = 1 << 18  # read and hashed at once

# Size in bytes and BLAKE3 of each piece of a file, from its beginning to its end.
Pieces = tuple[tuple[int, str], ...]


class FilePart(NamedTuple):
    """A piece of a file: its first byte, size and digest; ``place`` names it in messages."""

    file: str
    start: int
    size_bytes: int
    blake3: str = ""
    place: str = ""


def blake3_file(path: Path, start: int = 0, size_bytes: int = sys.maxsize) -> str:
    """Return the hexadecimal BLAKE3 of a file, as ``b3sum`` prints it, or of a piece of it.

    Args:
        path: The file.
        start: First byte of the piece.
        size_bytes: Size of the piece; it ends with the file at the latest.
    """
    digest, block = blake3(), memoryview(bytearray(_BLOCK_BYTES))
    # Not mapped: if the file is cut meanwhile, reading a map of it is a SIGBUS.
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while count := stream.readinto(block[:size_bytes]):
            digest.update(block[:count])
            size_bytes -= count
    return digest.hexdigest()


def blake3_parts(directory: Path, parts: Sequence[FilePart]) -> list[str]:
    """Return the digest of each part, hashed by several threads, of which the caller's is one.

    The caller's thread hashes too, first of all the largest part: a rank whose main thread only
    waited, for minutes with a large base, would be taken for one that hangs.
    """
    digests = [""] * len(parts)

    def hash_all(indices: Iterable[int]) -> None:
        for index in indices:
            part = parts[index]
            digests[index] = blake3_file(directory / part.file, part.start, part.size_bytes)

    by_size = sorted(range(len(parts)), key=lambda index: parts[index].size_bytes, reverse=True)
    rest = iter(by_size[1:])  # shared: each thread takes the next
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        others = threads.map(hash_all, [rest] * (_NUM_THREADS - 1))
        hash_all(by_size[:1])
        hash_all(rest)
        list(others)  # raises what they raised
    return digests


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
