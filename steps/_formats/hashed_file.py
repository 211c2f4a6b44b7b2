"""A file that knows the BLAKE3 of what was written to it, so that nobody has to read it again."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from blake3 import blake3

from nemotron.steps._formats.output_file import OutputFile

_BLOCK_BYTES = 1 << 20  # that are hashed at once; they fit into a core's cache


class HashedFile(OutputFile):
    """An ``OutputFile`` that a thread follows: it hashes what it finds in the page cache.

    It may fall behind as far as it likes, so the writer never waits for it; the block's end does.

    Attributes:
        blake3: Hexadecimal digest of the content; after the block.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.blake3 = ""
        self._told_bytes = 0
        self._ends: SimpleQueue[int | None] = SimpleQueue()  # sizes to hash up to, then None
        self._thread = ThreadPoolExecutor(1)
        self._digest = self._thread.submit(self._follow)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._ends.put(self.size_bytes)
        self._ends.put(None)
        try:
            if kind is None:
                os.fsync(self._stream.fileno())  # while the rest is hashed
        finally:
            self._thread.shutdown()
            self._stream.close()
        if kind is None:
            self.blake3 = self._digest.result()

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; they may change or go when this returns."""
        count = super().write(data)
        if self.size_bytes - self._told_bytes >= _BLOCK_BYTES:
            self._told_bytes = self.size_bytes
            self._ends.put(self.size_bytes)
        return count

    def _follow(self) -> str:
        """Return the digest of all that is written until the end."""
        digest, block = blake3(), memoryview(bytearray(_BLOCK_BYTES))
        hashed = 0
        while (end := self._ends.get()) is not None:
            while hashed < end:
                count = os.preadv(self._stream.fileno(), [block[: end - hashed]], hashed)
                if count == 0:
                    raise OSError(f"{self._stream.name} was cut while it was written")
                digest.update(block[:count])
                hashed += count
        return digest.hexdigest()
