"""One safetensors file: reads single tensors by offset, writes it block by block.

To write a file, the safetensors library needs all of its tensors in memory; this writer needs a
block of one.
The format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape,
[start, end) in the data), the data.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.mapped_bytes import map_tensor
from nemotron.steps._formats.output_file import OutputFile
from nemotron.steps._formats.threads import in_threads
from nemotron.steps._formats.weights import DTYPE_NAMES, DTYPES, check_block, check_bytes, damaged

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in the file: name of its type, shape, first byte and end."""

    dtype_name: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file opened for reading; only the header is read until a tensor is asked for.

    Raises:
        NemotronError: ``artifact_damaged``: the header does not parse, or the file is shorter or
            longer than the header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size_bytes < 8 or header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
                raise damaged(path, "the header is truncated; this is not a safetensors file")
            header = _parse_header(path, stream.read(header_bytes))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {
            name: _parse_entry(path, name, entry, data_start=8 + header_bytes)
            for name, entry in header.items()
        }
        end = max((entry.end for entry in self.entries.values()), default=8 + header_bytes)
        if end != size_bytes:
            raise damaged(path, f"the file has {size_bytes} bytes, but its header says {end}")

    def read(self, name: str) -> Tensor:
        """Return one tensor, whose memory is the page cache; see ``map_tensor``.

        Raises:
            NemotronError: ``weights_dtype`` (as ``dtype``) or ``artifact_damaged``.
        """
        entry = self.entries[name]
        dtype = self.dtype(name)
        try:
            return map_tensor(self.path, start=entry.start, shape=entry.shape, dtype=dtype)
        except ValueError:
            raise damaged(self.path, f"{name} is truncated") from None

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of one tensor.

        Raises:
            NemotronError: ``weights_dtype``: it is not one of ``DTYPES``.
        """
        kind = self.entries[name].dtype_name
        if kind not in DTYPES:
            raise NemotronError(
                "weights_dtype",
                f"{name} is {kind}; wanted one of {', '.join(DTYPES)}",
                where=str(self.path),
                why="a quantized tensor cannot be used without its scales",
                fix="use the unquantized checkpoint",
                exit_code=ExitCode.DATA,
            )
        return DTYPES[kind]


def write_safetensors(
    path: Path,
    *,
    names: Sequence[str],
    shape: Callable[[str], tuple[int, ...]],
    dtype: Callable[[str], torch.dtype],
    blocks: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
    num_at_a_time: int = 1,
) -> tuple[bytes, list[str]]:
    """Write a safetensors file, a block of a tensor at a time.

    Tensors of wider types come first, so that every tensor is aligned to its own width.

    Args:
        path: The file.
        names: Names of the tensors; those of one type are written in this order.
        shape: Returns the shape of a tensor.
        dtype: Returns the type of a tensor.
        blocks: Returns a tensor in blocks of its rows, each written before the next one is asked
            for; called once per name, in other threads.
        metadata: Text entries beside the obligatory ``format``.
        num_at_a_time: Tensors that are written at a time.

    Returns:
        The header with its length in front, and the names of the tensors in the order in which
        their bytes follow.

    Raises:
        ValueError: A tensor is not of its shape and type.
    """
    ordered = sorted(names, key=lambda name: -dtype(name).itemsize)
    header, starts = _lay_out(ordered, shape, dtype, metadata or {})

    def write(name: str) -> None:
        start = at = len(header) + starts[name]
        for block in blocks(name):
            check_block(name, block, shape=shape(name), dtype=dtype(name))
            at += stream.write_at(at, raw_bytes(block))
        check_bytes(name, at - start, shape=shape(name), dtype=dtype(name))

    with OutputFile(path) as stream:
        stream.write(header)
        in_threads(write, ordered, num_threads=num_at_a_time)
    return header, ordered


def _lay_out(
    names: Sequence[str],
    shape: Callable[[str], tuple[int, ...]],
    dtype: Callable[[str], torch.dtype],
    metadata: Mapping[str, str],
) -> tuple[bytes, dict[str, int]]:
    """Return the header, with its length in front, and where each tensor begins after it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    offset = 0
    for name in names:
        starts[name] = offset
        offset += math.prod(shape(name)) * dtype(name).itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype(name)],
            "shape": list(shape(name)),
            "data_offsets": [starts[name], offset],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise damaged(path, "the header is not JSON; this is not a safetensors file")
    return header


def _parse_entry(path: Path, name: str, entry: Any, *, data_start: int) -> TensorEntry:
    try:
        kind, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        start, end = (data_start + int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise damaged(path, f"the header's entry for {name} does not parse") from None
    width = DTYPES[kind].itemsize if kind in DTYPES else None
    is_valid = data_start <= start <= end and all(size >= 0 for size in shape)
    if not is_valid or (width is not None and math.prod(shape) * width != end - start):
        raise damaged(path, f"the header's entry for {name} contradicts itself")
    return TensorEntry(kind, shape, start, end)
