"""Reads directories of torch.distributed.checkpoint (DCP) without a process group.

A tensor is stored as chunks, each with its offsets in the global tensor. To read a slice, only the
chunks that intersect it are opened, each by ``torch.load(weights_only=True)`` on its own byte
range, so that nothing in a checkpoint can run code.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.steps._formats.mapped_bytes import map_tensor
from nemotron.steps._formats.torch_dist_metadata import (
    METADATA_FILE,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
    read_metadata,
)
from nemotron.steps._formats.weights import damaged


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the byte range that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length_bytes: int


class TorchDistReader:
    """A DCP directory opened for reading: tensors by name, whole or sliced.

    Args:
        directory: Holds ``.metadata`` and the ``.distcp`` files.

    Raises:
        NemotronError: ``checkpoint_missing`` (no ``.metadata``), ``artifact_damaged`` (it does not
            parse, or a file is missing or shorter than it says), ``unsafe_pickle`` (it asks for
            anything but the classes of a checkpoint).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        metadata = read_metadata(directory / METADATA_FILE)
        try:
            self._tensors = {
                name: entry
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self._chunks = {
                name: _locate_chunks(name, entry, metadata.storage_data)
                for name, entry in self._tensors.items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(directory / METADATA_FILE, f"it contradicts itself: {error!r}") from None
        self._check_files()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors (not of byte items such as ``_extra_state``)."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of a tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._tensors[name].properties.dtype

    def starts(self, name: str, dim: int) -> tuple[int, ...]:
        """Return where a tensor's chunks begin along a dimension, ascending: how it was split."""
        return tuple(sorted({chunk.offsets[dim] for chunk in self._chunks[name]}))

    def read(self, name: str, index: Sequence[slice] = ()) -> Tensor:
        """Return a tensor, or the box of it that ``index`` cuts out.

        Args:
            name: One of ``names``.
            index: Slices of step 1 for the leading dimensions; the others are whole.

        Raises:
            KeyError: There is no such tensor.
            NemotronError: ``artifact_damaged``: a chunk does not load or is not what ``.metadata``
                says, or the chunks do not cover the box.
        """
        shape = self.shape(name)
        slices = [*index, *[slice(None)] * (len(shape) - len(index))]
        bounds = [part.indices(size)[:2] for part, size in zip(slices, shape, strict=True)]
        starts = tuple(start for start, _ in bounds)
        sizes = tuple(max(stop - start, 0) for start, stop in bounds)
        boxes = [(chunk, _intersect(chunk, starts, sizes)) for chunk in self._chunks[name]]
        needed = [(chunk, *box) for chunk, box in boxes if box is not None]
        if len(needed) == 1 and needed[0][2] == tuple(slice(0, size) for size in sizes):
            chunk, source, _ = needed[0]
            return self._load(name, chunk)[source].contiguous()  # rows need no copy
        result = torch.empty(sizes, dtype=self.dtype(name))
        num_filled = 0
        for chunk, source, target in needed:
            result[target] = self._load(name, chunk)[source]
            num_filled += result[target].numel()
        if num_filled != result.numel():
            raise damaged(self.directory, f"the chunks of {name} do not cover {starts} + {sizes}")
        return result

    def _load(self, name: str, chunk: Chunk) -> Tensor:
        path = self.directory / chunk.file
        try:
            tensor = _load_part(path, chunk)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise damaged(path, f"{name} at byte {chunk.start} does not load: {error}") from None
        is_tensor = isinstance(tensor, Tensor) and tensor.dtype == self.dtype(name)
        if not is_tensor or tuple(tensor.shape) != chunk.sizes:
            raise damaged(path, f"{name} at byte {chunk.start} is not what .metadata says")
        return tensor

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length_bytes)
        for file, end in sorted(ends.items()):
            path = self.directory / file
            if Path(file).name != file:
                raise damaged(
                    self.directory / METADATA_FILE, f"{file!r} points outside the directory"
                )
            if not path.is_file():
                raise damaged(path, "the file is missing, but .metadata names it")
            size_bytes = path.stat().st_size
            if size_bytes < end:
                problem = f"the file has {size_bytes} bytes, but .metadata needs {end}"
                raise damaged(path, problem)


def _load_part(path: Path, chunk: Chunk) -> Any:
    """Return what ``torch.load`` reads in a byte range; a contiguous tensor is not copied."""
    with path.open("rb", buffering=0) as stream:
        part = io.BufferedReader(_Part(stream, chunk.start, chunk.length_bytes))
        described = torch.load(part, map_location="meta", weights_only=True)
        if isinstance(described, Tensor) and described.is_contiguous():
            storage = described.untyped_storage()
            start: int | None = getattr(storage, "_checkpoint_offset", None)
            is_all = described.nbytes == storage.nbytes()
            if start is not None and is_all and start + described.nbytes <= chunk.length_bytes:
                shape, dtype = tuple(described.shape), described.dtype
                return map_tensor(path, start=chunk.start + start, shape=shape, dtype=dtype)
        part.seek(0)
        return torch.load(part, map_location="cpu", weights_only=True)


class _Part(io.RawIOBase):
    """A byte range of an open file as a file, so that torch.load need not be given a copy."""

    def __init__(self, stream: io.FileIO, start: int, length_bytes: int) -> None:
        self._stream, self._start, self._length_bytes = stream, start, length_bytes
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length_bytes}
        target = origin[whence] + offset
        self._stream.seek(self._start + target)
        return target

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        left = max(self._length_bytes - self.tell(), 0)
        return self._stream.readinto(view[:left]) or 0


def _locate_chunks(
    name: str, entry: TensorStorageMetadata, storage: dict[MetadataIndex, StorageInfo]
) -> list[Chunk]:
    chunks = []
    for chunk in entry.chunks:
        place = storage[MetadataIndex(name, chunk.offsets)]
        if place.transform_descriptors:
            raise KeyError(f"{name} is stored with {place.transform_descriptors}")
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        chunks.append(Chunk(offsets, sizes, place.relative_path, place.offset, place.length))
    return chunks


def _intersect(
    chunk: Chunk, starts: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the intersection in the chunk's and in the result's coordinates; None if empty."""
    source, target = [], []
    for offset, length, start, size in zip(chunk.offsets, chunk.sizes, starts, sizes, strict=True):
        low, high = max(offset, start), min(offset + length, start + size)
        if low >= high:
            return None
        source.append(slice(low - offset, high - offset))
        target.append(slice(low - start, high - start))
    return tuple(source), tuple(target)
