"""Reads packed Parquet; refuses files that no packing writes and no training accepts.

The trainer has the same rules, in ``steps/_training/batches.py``; here they are applied to a whole
row group at a time. pyarrow and numpy are imported where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron.errors import ExitCode, NemotronError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

COLUMNS = ("input_ids", "loss_mask", "seq_start_id")
_MOST_IDS = 1 << 31
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def open_file(path: Path) -> pq.ParquetFile:
    """Open a Parquet file and check that it has the columns of packed data.

    Raises:
        NemotronError: ``packs_damaged``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from None
    for name in COLUMNS:
        if name not in schema.names:
            raise damaged(path, f"it has no column {name}")
        kind = schema.field(name).type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        item = kind.value_type if is_list else kind
        is_flag = name == "loss_mask" and pa.types.is_boolean(item)
        if not is_list or not (is_flag or pa.types.is_integer(item)):
            raise damaged(path, f"its column {name} is {kind}, not a list of integers")
    return file


def row_groups(files: Sequence[Path]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield, for each row group: row starts, documents of each row, document starts, mask.

    Raises:
        NemotronError: ``packs_damaged``.
    """
    import numpy as np

    first = 0
    for path in files:
        file = open_file(path)
        for number in range(file.num_row_groups):
            columns = read_group(path, file, number, ("loss_mask", "seq_start_id"), first)
            masks, starts = columns
            mask_offsets = masks.offsets.to_numpy()
            documents = np.diff(starts.offsets.to_numpy())
            positions = starts.flatten().to_numpy().astype(np.int64)
            bad = _first_bad_row(np.diff(mask_offsets), documents, positions)
            if bad is not None:
                raise _bad_starts(path, first + bad)
            yield (
                mask_offsets[:-1] - mask_offsets[0],
                documents,
                positions,
                masks.flatten().to_numpy(zero_copy_only=False),
            )
            first += len(masks)


def read_group(
    path: Path, file: pq.ParquetFile, number: int, names: Sequence[str], first: int
) -> list[Any]:
    """Return columns of a row group, whose first row has the number ``first`` in the split.

    Raises:
        NemotronError: ``packs_damaged``: a page cannot be read, or there is a null.
    """
    import pyarrow as pa

    try:
        table = file.read_row_group(number, columns=list(names))
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from None
    columns = [table.column(name).combine_chunks() for name in names]
    for name, column in zip(names, columns, strict=True):
        if column.null_count or column.flatten().null_count:
            rows = f"rows {first} to {first + len(column) - 1}"
            raise damaged(path, f"{name} has a null in {rows}")
    return columns


def check_row(path: Path, number: int, row: dict[str, list[int]]) -> None:
    """Refuse a row whose columns do not fit each other, or with ids that no token has.

    Raises:
        NemotronError: ``packs_damaged``.
    """
    import numpy as np

    ids, mask, starts = (row[name] for name in COLUMNS)
    if len(ids) != len(mask):
        raise damaged(
            path, f"row {number} has {len(ids)} input_ids but {len(mask)} loss_mask values"
        )
    sizes = (np.array([len(ids)]), np.array([len(starts)]), np.array(starts, dtype=np.int64))
    if _first_bad_row(*sizes) is not None:
        raise _bad_starts(path, number)
    bad = next((token for token in ids if not 0 <= token < _MOST_IDS), None)
    if bad is not None:
        raise damaged(path, f"row {number} has {bad} in its input_ids, which no token has")


def file_properties(path: Path) -> dict[str, Any]:
    """Return what we wrote into a file's key-value metadata.

    Raises:
        NemotronError: ``packs_damaged``.
    """
    prefix = b"nemotron."
    entries = open_file(path).metadata.metadata or {}
    found = {
        key.removeprefix(prefix).decode(errors="replace"): value.decode(errors="replace")
        for key, value in entries.items()
        if key.startswith(prefix)
    }
    numbers = {key: int(value) for key, value in found.items() if _NUMBER.fullmatch(value)}
    size = found.get("pack_size")
    if size is not None and "pack_size" not in numbers:
        raise damaged(path, f"its metadata has pack_size {size!r}, which is not a number")
    return found | numbers


def damaged(path: Path, problem: str) -> NemotronError:
    """Return the error of a file that is not what a packing writes."""
    return NemotronError(
        "packs_damaged",
        f"{path} is not packed Parquet: {problem}",
        where=str(path),
        fix="run data_prep/sft_packing again",
        exit_code=ExitCode.DATA,
    )


def _first_bad_row(lengths: Any, documents: Any, starts: Any) -> int | None:
    """Return the first row whose ``seq_start_id`` does not rise from 0 to below its length.

    Args:
        lengths: Tokens of each row.
        documents: Documents of each row.
        starts: Where the documents of all rows start, each in its row.
    """
    import numpy as np

    rows = np.repeat(np.arange(len(lengths)), documents)
    is_first = np.diff(rows, prepend=-1) > 0
    is_right = np.where(is_first, starts == 0, np.diff(starts, prepend=-1) > 0)
    is_right &= starts < lengths[rows]
    bad = np.union1d(np.flatnonzero(documents == 0), rows[~is_right])
    return int(bad[0]) if len(bad) else None


def _bad_starts(path: Path, row: int) -> NemotronError:
    return damaged(path, f"seq_start_id of row {row} does not increase from 0 to below its length")
