"""A file that knows the BLAKE3 of what was written to it, so that nobody has to read it again."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from blake3 import blake3

_BLOCK_BYTES = 1 << 20  # that are hashed at once; they fit into a core's cache
_WRITE_OUT_BYTES = 1 << 26  # that are sent to the disk at once
_SYNC_FILE_RANGE_WRITE = 2  # of fcntl.h: begin to write out, and do not wait
_C_LIBRARY = ctypes.CDLL(None)


class HashedFile:
    """A new file, written from its beginning and on the disk when the ``with`` block ends well.

    A thread follows what is written: it hashes it, out of the page cache, and sends it to the disk.
    It may fall behind as far as it likes, so the writer never waits for it; the block's end does.

    Attributes:
        blake3: Hexadecimal digest of the content; after the block.
        size_bytes: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self.blake3 = ""
        self._stream = path.open("w+b", buffering=0)
        self._told_bytes = 0
        self._ends: SimpleQueue[int | None] = SimpleQueue()  # sizes to hash up to, then None
        self._thread = ThreadPoolExecutor(1)
        self._digest = self._thread.submit(self._follow)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._ends.put(self.size_bytes)
                os.fsync(self._stream.fileno())
        finally:
            self._ends.put(None)
            self._thread.shutdown()
            self._stream.close()
        if kind is None:
            self.blake3 = self._digest.result()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they may change or go when this returns."""
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):  # Linux writes 2 GiB at most in one call
            start += self._stream.write(view[start:])
        self.size_bytes += len(view)
        if self.size_bytes - self._told_bytes >= _BLOCK_BYTES:
            self._told_bytes = self.size_bytes
            self._ends.put(self.size_bytes)
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def _follow(self) -> str:
        """Return the digest of all that is written until the end."""
        digest, block = blake3(), memoryview(bytearray(_BLOCK_BYTES))
        hashed = sent = 0
        while (end := self._ends.get()) is not None:
            while hashed < end:
                count = os.preadv(self._stream.fileno(), [block[: end - hashed]], hashed)
                if count == 0:
                    raise OSError(f"{self._stream.name} was cut while it was written")
                digest.update(block[:count])
                hashed += count
                if hashed - sent >= _WRITE_OUT_BYTES:
                    _begin_to_write_out(self._stream.fileno(), sent, hashed - sent)
                    sent = hashed
        return digest.hexdigest()


def _begin_to_write_out(descriptor: int, start: int, num_bytes: int) -> None:
    """Have the disk begin with what would else all be left to the fsync."""
    if hasattr(_C_LIBRARY, "sync_file_range"):  # Linux
        first, count = ctypes.c_int64(start), ctypes.c_int64(num_bytes)
        _C_LIBRARY.sync_file_range(descriptor, first, count, _SYNC_FILE_RANGE_WRITE)
