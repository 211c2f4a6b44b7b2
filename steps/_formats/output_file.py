"""A new file that is on the disk when it is done, and on its way there while it is written."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

_WRITE_OUT_BYTES = 1 << 26  # that are sent to the disk at once
_SYNC_FILE_RANGE_WRITE = 2  # of fcntl.h: begin to write out, and do not wait
_C_LIBRARY = ctypes.CDLL(None)


class OutputFile:
    """A file, written from its beginning and on the disk when the ``with`` block ends well.

    Attributes:
        size_bytes: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self._stream = path.open("w+b", buffering=0)
        self._sent_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they may change or go when this returns."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):  # Linux writes 2 GiB at most in one call
            start += self._stream.write(view[start:])
        self.size_bytes += len(view)
        if self.size_bytes - self._sent_bytes >= _WRITE_OUT_BYTES:
            self._begin_to_write_out()
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def _begin_to_write_out(self) -> None:
        """Have the disk begin with what would else all be left to the fsync."""
        if hasattr(_C_LIBRARY, "sync_file_range"):  # Linux
            count = self.size_bytes - self._sent_bytes
            places = ctypes.c_int64(self._sent_bytes), ctypes.c_int64(count)
            _C_LIBRARY.sync_file_range(self._stream.fileno(), *places, _SYNC_FILE_RANGE_WRITE)
        self._sent_bytes = self.size_bytes
