"""Receipts of finished tasks, written last: a task has no other state than done or not done.

A task's key is the digest of everything that its result depends on. So a receipt is valid wherever
it is found, a task that was killed has left nothing that counts, and two processes that run the
same task at once write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotron.artifacts import blake3_file

Receipt = dict[str, Any]


def code_digest() -> str:
    """Return the digest of this step's own code, since other code may give other results."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def receipt_path(directory: Path, key: str) -> Path:
    """Return where the receipt of a task is kept."""
    return directory / f"{key}.json"


def find_receipt(directory: Path, key: str) -> Receipt | None:
    """Return the receipt of a task if it is done and its files are as the receipt says."""
    if not receipt_path(directory, key).is_file():
        return None
    try:
        receipt = read_receipt(directory, key)
        is_whole = receipt["key"] == key and all(
            (directory / name).stat().st_size == entry["size_bytes"]
            and blake3_file(directory / name) == entry["blake3"]
            for name, entry in receipt["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return receipt if is_whole else None


def read_receipt(directory: Path, key: str) -> Receipt:
    """Return the receipt of a task that this run has done, without checking its files."""
    return json.loads(receipt_path(directory, key).read_bytes())


def write_receipt(directory: Path, key: str, content: Receipt, *, files: list[str]) -> Receipt:
    """Write a task's receipt over the files that it left, and return it."""
    entries = {
        name: {
            "size_bytes": (directory / name).stat().st_size,
            "blake3": blake3_file(directory / name),
        }
        for name in files
    }
    receipt = {"key": key, "files": entries, **content}
    with aside(receipt_path(directory, key)) as path:
        path.write_text(json.dumps(receipt), encoding="utf-8")
    return receipt


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a path of this process alone; the file there is renamed to ``path`` at the end."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield own
        with own.open("rb") as stream:
            os.fsync(stream.fileno())
        own.replace(path)
    except BaseException:
        own.unlink(missing_ok=True)
        raise


def done_or(directory: Path, key: str, work: Callable[[], Receipt]) -> tuple[Receipt, bool]:
    """Return a task's receipt, and whether it was there already."""
    directory.mkdir(parents=True, exist_ok=True)
    found = find_receipt(directory, key)
    return (found, True) if found is not None else (work(), False)
