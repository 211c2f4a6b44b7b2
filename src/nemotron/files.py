"""Writes a file so that a reader sees either all of it or what was there before."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from nemotron.errors import writing


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file aside and rename it once it is on the disk; several may write it at once.

    Args:
        path: The file.
        text: Its content; bytes that were decoded with ``surrogateescape`` are restored.
        mode: Permissions, less the umask.
    """
    # A name that no other writer of the same file uses.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with writing(path), os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode("utf-8", "surrogateescape"))
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
