"""Writes directories of torch.distributed.checkpoint (DCP) without a process group.

Each data file can be written independently; ``.metadata``, written last, says what is where.
torch's ``dcp.load`` and Megatron-Bridge read the result.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from nemotron.steps._formats.output_file import OutputFile
from nemotron.steps._formats.safetensors_file import raw_bytes
from nemotron.steps._formats.torch_dist_metadata import METADATA_FILE
from nemotron.steps._formats.weights import DTYPE_NAMES, DTYPES, check_block, check_bytes

_ALIGNMENT_BYTES = 64  # as torch.save aligns tensors within what it writes


@dataclass(frozen=True)
class StoredItem:
    """One chunk of a tensor, or an object, and the byte range that holds it; plain JSON values.

    Args:
        name: Name of the whole tensor.
        file: Name of the data file.
        start: First byte.
        length_bytes: Number of bytes.
        dtype_name: safetensors' name of the type; None for an object that is no tensor.
        global_shape: Shape of the whole tensor.
        offsets: Where the chunk begins in the whole tensor.
        sizes: Shape of the chunk.
    """

    name: str
    file: str
    start: int
    length_bytes: int
    dtype_name: str | None = None
    global_shape: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class TorchDistFile:
    """One data file, written chunk by chunk in a ``with`` block, within ``without_crc32``.

    Args:
        path: The file, such as ``__0_0.distcp``.

    Attributes:
        items: The items that were written so far.
        blake3: Digest of the file; set at the end of the block.
    """

    def __init__(self, path: Path) -> None:
        self.items: list[StoredItem] = []
        self.blake3 = ""
        self._name = path.name
        self._stream = OutputFile(path)
        self._digest = blake3()

    def __enter__(self) -> TorchDistFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.__exit__(kind, error, trace)
        if kind is None:
            self.blake3 = self._digest.hexdigest()

    def write(
        self,
        name: str,
        tensor: Tensor,
        *,
        offsets: Sequence[int] | None = None,
        global_shape: Sequence[int] | None = None,
    ) -> None:
        """Append a tensor, or one chunk of it.

        Args:
            name: Name of the whole tensor.
            tensor: The chunk; all chunks of a tensor have the same type.
            offsets: Where the chunk begins in the whole tensor; zeros by default.
            global_shape: Shape of the whole tensor; that of ``tensor`` by default.
        """
        sizes, dtype = tensor.shape, tensor.dtype
        chunk = {"offsets": offsets, "global_shape": global_shape}
        self.write_blocks(name, iter([tensor]), sizes=sizes, dtype=dtype, **chunk)

    def write_blocks(
        self,
        name: str,
        blocks: Iterator[Tensor],
        *,
        sizes: Sequence[int],
        dtype: torch.dtype,
        offsets: Sequence[int] | None = None,
        global_shape: Sequence[int] | None = None,
    ) -> None:
        """Append a tensor, or one chunk of it, whose rows come in blocks; see ``write``.

        Raises:
            ValueError: They are not of the type and shape that were announced.
        """
        # torch.save needs a tensor; this one takes no memory, because nobody reads or writes it.
        placeholder = torch.empty(tuple(sizes), dtype=dtype, device="cpu")
        archive = _Archive(self._append, name, placeholder, blocks)
        start, length_bytes = self._save(placeholder, archive)
        archive.end()
        self.items.append(
            StoredItem(
                name,
                self._name,
                start,
                length_bytes,
                DTYPE_NAMES[dtype],
                tuple(global_shape or sizes),
                tuple(offsets or [0] * len(sizes)),
                tuple(sizes),
            )
        )

    def write_object(self, name: str, value: Any) -> None:
        """Append an item that is not a tensor, such as Megatron's ``_extra_state``."""
        archive = _Archive(self._append, name, torch.empty(0, device="cpu"), iter(()))
        self.items.append(StoredItem(name, self._name, *self._save(value, archive)))

    def _save(self, value: Any, archive: _Archive) -> tuple[int, int]:
        """Append what ``torch.save`` makes of a value; return where it begins, and its length."""
        self._append(bytes(-self._stream.size_bytes % _ALIGNMENT_BYTES))
        start = self._stream.size_bytes
        try:
            torch.save(value, archive)  # type: ignore[arg-type] (it needs write() only)
        except RuntimeError:
            # torch finishes its archive even after a failed write, and then complains of the gap.
            if archive.error is not None:
                raise archive.error from None
            raise
        return start, self._stream.size_bytes - start

    def _append(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._stream.write(data)


class _Archive:
    """The file that ``torch.save`` writes to; replaces a placeholder's memory by a tensor's blocks.

    Attributes:
        error: The error that a write raised, or None.
    """

    def __init__(
        self,
        append: Callable[[memoryview], None],
        name: str,
        placeholder: Tensor,
        blocks: Iterator[Tensor],
    ) -> None:
        self.error: BaseException | None = None
        self._append, self._name = append, name
        self._placeholder, self._blocks = placeholder, blocks
        self._num_bytes = 0  # of the blocks

    def write(self, data: memoryview) -> int:
        """Append the data; for a storage, torch passes the storage's own memory."""
        place = np.frombuffer(data, np.uint8).ctypes.data - self._placeholder.data_ptr()
        try:
            if not 0 <= place < self._placeholder.nbytes:
                self._append(data)
            elif len(data) == self._placeholder.nbytes:
                self._pass_blocks()
            else:
                raise ValueError(f"torch.save hands over {self._name} in pieces")
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def end(self) -> None:
        """Check that exactly the tensor was written.

        Raises:
            ValueError: Less was written, or more.
        """
        if self._placeholder.nbytes == 0:  # torch writes nothing for an empty tensor
            self._pass_blocks()
        shape, dtype = self._placeholder.shape, self._placeholder.dtype
        check_bytes(self._name, self._num_bytes, shape=shape, dtype=dtype)

    def _pass_blocks(self) -> None:
        shape, dtype = self._placeholder.shape, self._placeholder.dtype
        for block in self._blocks:
            check_block(self._name, block, shape=shape, dtype=dtype)
            self._num_bytes += block.nbytes
            self._append(raw_bytes(block))


@contextlib.contextmanager
def torch_dist_writer(directory: Path) -> Iterator[TorchDistFile]:
    """Yield the one data file of a directory; the block's end writes ``.metadata``.

    Raises:
        ValueError: As ``write_metadata``; there is no ``.metadata`` then.
    """
    with without_crc32(), TorchDistFile(directory / "__0_0.distcp") as file:
        yield file
    write_metadata(directory, file.items)


def write_metadata(directory: Path, items: Iterable[StoredItem]) -> None:
    """Write ``.metadata``, which says where everything is; its bytes depend on the items' order.

    Raises:
        ValueError: The chunks of one tensor differ in type.
    """
    # Imported here: it takes half a second, and writing Hugging Face's layout does not need it.
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for item in items:
        place = _StorageInfo(item.file, item.start, item.length_bytes)
        if item.dtype_name is None:
            entries[item.name] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(item.name)] = place
            continue
        dtype = DTYPES[item.dtype_name]
        whole = dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype=dtype), torch.Size(item.global_shape), []
        )
        entry = entries.setdefault(item.name, whole)
        if not isinstance(entry, dcp.TensorStorageMetadata) or entry.properties.dtype != dtype:
            raise ValueError(f"{item.name}: the chunks of one tensor must have one type")
        offsets = torch.Size(item.offsets)
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size(item.sizes)))
        storage[dcp.MetadataIndex(item.name, offsets)] = place
    metadata = dcp.Metadata(
        entries, storage_data=storage, storage_meta=dcp.StorageMeta(), version="1.0.0"
    )
    (directory / METADATA_FILE).write_bytes(pickle.dumps(metadata))


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """Keep ``torch.save`` from computing a CRC-32, which ``torch.load`` never looks at.

    It would be that of a placeholder's memory, not of what is written in its place. The setting is
    one of the whole process, so there must be one such block around all threads that write.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
