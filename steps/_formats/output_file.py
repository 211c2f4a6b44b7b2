"""Writes a new file, sending it to the disk all the while, so that the final fsync is short."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

_WRITE_OUT_BYTES = 1 << 26  # sent to the disk at a time
_SYNC_FILE_RANGE_WRITE = 2  # of fcntl.h: begin to write out, and do not wait
_C_LIBRARY = ctypes.CDLL(None)


class OutputFile:
    """A file that is on the disk when the ``with`` block ends well.

    Attributes:
        size_bytes: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self._stream = path.open("w+b", buffering=0)
        self._sent_bytes = 0
        self._lock = Lock()

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
        """Append bytes; the buffer may be reused when this returns."""
        return self.write_at(self.size_bytes, data)

    def write_at(self, start: int, data: bytes | memoryview) -> int:
        """Write bytes at a position; several threads may write at once."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):  # Linux writes 2 GiB at most in one call
            written += os.pwrite(self._stream.fileno(), view[written:], start + written)
        with self._lock:
            self.size_bytes += written
            is_due = self.size_bytes - self._sent_bytes >= _WRITE_OUT_BYTES
            if is_due:
                self._sent_bytes = self.size_bytes
        if is_due:
            self._begin_to_write_out()
        return written

    def _begin_to_write_out(self) -> None:
        """Let the kernel begin to write what would otherwise all be left to the fsync."""
        if hasattr(_C_LIBRARY, "sync_file_range"):  # Linux
            whole_file = ctypes.c_int64(0), ctypes.c_int64(0)
            _C_LIBRARY.sync_file_range(self._stream.fileno(), *whole_file, _SYNC_FILE_RANGE_WRITE)
