"""Notes that the nodes of one run leave for each other, in files that all of them see.

Every node appends to a file of its own; nothing is changed or locked. A file is opened anew for
every note and every look, because that is when network file systems show what others have written.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

Note = dict[str, Any]


class NoteFile:
    """The notes of one node, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def exists(self) -> bool:
        """Return whether the node has left a note."""
        return self._path.exists()

    def append(self, **note: Any) -> None:
        """Leave a note, unless the board has been removed: then nobody reads it any more."""
        with (
            contextlib.suppress(FileNotFoundError),
            self._path.open("a", encoding="utf-8") as stream,
        ):
            stream.write(json.dumps(note) + "\n")

    def read_new(self) -> list[Note]:
        """Return the notes since the last call; a line without its end is still being written."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                whole = stream.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]
