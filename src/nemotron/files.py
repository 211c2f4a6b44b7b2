"""Writing a file so that whoever reads it sees all of it or what was there before."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from nemotron.errors import writing


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a file aside, and put it in its place when it is on disk; writers may overlap.

    Args:
        path: The file.
        text: Its content; what was decoded with ``surrogateescape`` gets its own bytes again.
        mode: Permissions, less the umask.
    """
    # A name that another writer of the same file does not have.
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
