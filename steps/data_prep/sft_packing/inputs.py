"""Lists the files of data sets, and cuts them into parts, each of which is read by one task.

JSONL is cut into byte ranges of whole lines, Parquet into row groups. A JSON list or a compressed
file is one part, because nothing says where a row begins in it.
"""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nemotron.artifacts import MANIFEST
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import HUB, STEP, Dataset
from nemotron.steps.data_prep.sft_packing.hub import hub_files

DATA = (".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A task writes its result at its end, so the size of parts bounds memory and the cost of a kill.
MIN_PART_BYTES, MAX_PART_BYTES = 1 << 20, 64 << 20
PARTS_PER_CORPUS = 256

Kind = Literal["lines", "list", "parquet"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one task reads of a file.

    Attributes:
        path: The file.
        kind: How its rows are stored.
        start: First byte of ``lines``, first row group of ``parquet``, else 0.
        stop: Behind the last byte or row group; None for the whole file.
    """

    path: Path
    kind: Kind
    start: int = 0
    stop: int | None = None


def list_files(dataset: Dataset) -> list[Path]:
    """Return the files of a data set in the order of their names.

    A directory gives the data files directly in it, without hidden ones.

    Raises:
        NemotronError: ``missing_training_data``; ``unreadable_input``: a name cannot be written
            into ``artifact.json``.
    """
    if dataset.path.startswith(HUB):
        return sorted(hub_files(dataset, is_data=is_data))
    path = Path(dataset.path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [item for item in path.iterdir() if is_data(item) and item.is_file()]
        files = [item for item in files if item.name != MANIFEST and not item.name.startswith(".")]
    else:
        files = [Path(name) for name in glob.glob(dataset.path, recursive=True)]  # noqa: PTH207
        files = [item for item in files if item.is_file()]
    if not files:
        what = f"contains no {', '.join(DATA)} file" if path.is_dir() else "does not exist"
        raise step_error(STEP, "missing_training_data", f"{path} {what}", where=dataset.name)
    for item in files:
        if not is_data(item):
            problem = f"{item} is not one of {', '.join(DATA)}, plain or {' or '.join(COMPRESSED)}"
            raise step_error(STEP, "missing_training_data", problem, where=dataset.name)
        if any("\ud800" <= char <= "\udfff" for char in str(item)):  # as Python decodes such bytes
            problem = f"the name {item.name!a} is not UTF-8; rename the file"
            raise step_error(STEP, "unreadable_input", problem, where=dataset.name)
    return sorted(files)


def is_data(path: Path) -> bool:
    """Return whether a file's name says that this step reads it."""
    stem = Path(path.stem) if path.suffix in COMPRESSED else path
    return stem.suffix in DATA and not (stem.suffix == ".parquet" and path.suffix in COMPRESSED)


def part_bytes(files: Sequence[Path]) -> int:
    """Return how large the parts of a corpus should be; depends on its size alone."""
    total = sum(file.stat().st_size for file in files)
    return min(max(total // PARTS_PER_CORPUS, MIN_PART_BYTES), MAX_PART_BYTES)


def cut_into_parts(file: Path, *, size_bytes: int) -> list[Part]:
    """Return the parts of a file, each of about ``size_bytes``, in order.

    Raises:
        NemotronError: ``unreadable_input``.
    """
    try:
        if file.suffix == ".parquet":
            return list(_row_groups(file, size_bytes))
        with open_bytes(file) as stream:
            head = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
        if head.startswith(b"[") and ".json" in file.suffixes:
            return [Part(file, "list")]
        if file.suffix in COMPRESSED:
            return [Part(file, "lines")]
        return list(_line_ranges(file, size_bytes))
    except (OSError, EOFError, pa.ArrowException) as error:
        raise unreadable(file, error) from None


def open_bytes(file: Path) -> io.BufferedReader:
    """Return a buffered stream of a file's bytes, decompressed where its name says so."""
    if file.suffix not in COMPRESSED:
        return file.open("rb")
    codec = "gzip" if file.suffix == ".gz" else "zstd"
    stream = pa.CompressedInputStream(pa.OSFile(str(file)), codec)
    return io.BufferedReader(stream)  # pyright: ignore[reportArgumentType]


def unreadable(file: Path, error: Exception) -> NemotronError:
    """Return the error for a file that cannot be read to its end."""
    problem = f"{type(error).__name__}: {error}"[:300]
    return step_error(STEP, "unreadable_input", problem, where=str(file))


def _row_groups(file: Path, size_bytes: int) -> Iterator[Part]:
    metadata = pq.read_metadata(file)
    start = held_bytes = 0
    for group in range(metadata.num_row_groups):
        held_bytes += metadata.row_group(group).total_byte_size
        if held_bytes >= size_bytes or group == metadata.num_row_groups - 1:
            yield Part(file, "parquet", start, group + 1)
            start, held_bytes = group + 1, 0


def _line_ranges(file: Path, size_bytes: int) -> Iterator[Part]:
    total = file.stat().st_size
    start = 0
    with file.open("rb") as stream:
        while start < total:
            stop = _end_of_line(stream, start + size_bytes - 1, total)
            yield Part(file, "lines", start, stop)
            start = stop


def _end_of_line(stream: io.BufferedReader, position: int, total: int) -> int:
    """Return where the line that holds ``position`` ends, without holding it."""
    if position >= total:
        return total
    stream.seek(position)
    while chunk := stream.read(1 << 20):
        found = chunk.find(b"\n")
        if found >= 0:
            return stream.tell() - len(chunk) + found + 1
    return total
