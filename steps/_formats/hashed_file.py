"""A file that knows the sha256 of what was written to it, so that nobody has to read it again."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

_LARGE_BYTES = 1 << 18  # below, handing it to a thread costs more than hashing it


class HashedFile:
    """A new file, written from its beginning and on the disk when the ``with`` block ends well.

    What is large is hashed by a thread while it is written, and nobody holds it afterwards.

    Attributes:
        sha256: Hexadecimal digest of the content; after the block.
        size_bytes: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self.sha256 = ""
        self._digest = hashlib.sha256()
        self._stream = path.open("wb", buffering=0)
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            os.fsync(self._stream.fileno())
            self.sha256 = self._digest.hexdigest()
        self._stream.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they may change or go when this returns."""
        view = memoryview(data).cast("B")
        if len(view) < _LARGE_BYTES:
            self._digest.update(view)
            self._write_all(view)
        else:
            hashed = self._thread.submit(self._digest.update, view)
            try:
                self._write_all(view)
            finally:
                hashed.result()
        self.size_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def _write_all(self, view: memoryview) -> None:
        start = 0
        while start < len(view):  # Linux writes 2 GiB at most in one call
            start += self._stream.write(view[start:])
