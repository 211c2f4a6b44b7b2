"""Packed rows from Parquet to micro batches.

A row is a pack: documents one after the other, ``seq_start_id`` their starts, ``loss_mask`` stored
shifted, so that ``loss_mask[i]`` says whether the prediction made at token i is trained. A document
of L stored tokens gives L - 1 predictions: tokens ``ids[s:e-1]``, labels ``ids[s+1:e]``.

Source: the collate contract of Megatron-Bridge's packed Parquet dataset.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.dropout import DropoutRows

# Number of row groups whose rows are shuffled together and kept decoded. Packed rows are stored in
# random order already, so nothing is lost; with a permutation of all rows, nearly every row read
# would decode a whole group.
WINDOW_GROUPS = 8
# A batch may reach from one window into the next.
_CACHED_GROUPS = 2 * WINDOW_GROUPS
_COLUMNS = ("input_ids", "loss_mask", "seq_start_id")


class BadRowError(ValueError):
    """A packed row or file breaks the contract; the message says which and how."""


@dataclass(frozen=True)
class PackedRow:
    """One pack: ids and shifted mask of its documents, and where each document starts."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    seq_start_id: np.ndarray


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, their documents one after the other.

    Attributes:
        tokens: Token ids, [S] int64.
        labels: Ids to predict at the supervised tokens only, [K] int64.
        supervised: Positions of those tokens, [K] int64.
        cu_seqlens: Boundaries of the documents, from 0 to S.
        row_tokens: Tokens of each row; their sum is S.
    """

    tokens: Tensor
    labels: Tensor
    supervised: Tensor
    cu_seqlens: tuple[int, ...]
    row_tokens: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same with its tensors on a device."""
        # Else each waits for all that the device has to do before it.
        tokens, labels, supervised = (
            each.to(device, non_blocking=True)
            for each in (self.tokens, self.labels, self.supervised)
        )
        return replace(self, tokens=tokens, labels=labels, supervised=supervised)

    def dropout_rows(self, keys: Sequence[str]) -> DropoutRows:
        """Return the identity of the rows, one key each, for layout-independent dropout."""
        return DropoutRows(keys=keys, num_tokens=self.row_tokens)


class PackedSplit:
    """The rows of one split, read row group by row group.

    Args:
        directory: Holds the split's ``*.parquet`` shards.
        vocab_size: Ids must be below it.

    Raises:
        BadRowError: A shard has no such columns, or is cut short.
    """

    def __init__(self, directory: Path, *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._groups: list[tuple[Path, int]] = []
        self._first_rows = [0]
        self._cache: OrderedDict[int, list[PackedRow]] = OrderedDict()
        self._order_of: tuple[int, int] | None = None
        self._order = np.empty(0, dtype=np.int64)
        for path in sorted(directory.glob("*.parquet")):
            metadata = _open(path).metadata
            missing = set(_COLUMNS) - set(metadata.schema.to_arrow_schema().names)
            if missing:
                raise BadRowError(f"{path} has no column {sorted(missing)[0]}")
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                rows = metadata.row_group(group).num_rows
                self._first_rows.append(self._first_rows[-1] + rows)

    def __len__(self) -> int:
        return self._first_rows[-1]

    def global_batch(self, iteration: int, *, global_batch_size: int, seed: int) -> list[int]:
        """Return the row numbers of a global batch; iterations and rows count from 0."""
        epoch, batch = divmod(iteration, len(self) // global_batch_size)
        if self._order_of != (seed, epoch):
            self._order_of = (seed, epoch)
            self._order = epoch_order(self._first_rows, seed=seed + epoch)
        return self._order[batch * global_batch_size :][:global_batch_size].tolist()

    def __getitem__(self, index: int) -> PackedRow:
        group = bisect_right(self._first_rows, index) - 1
        return self._read_group(group)[index - self._first_rows[group]]

    def _read_group(self, group: int) -> list[PackedRow]:
        if group not in self._cache:
            path, number = self._groups[group]
            table = _open(path).read_row_group(number, columns=list(_COLUMNS))
            columns = [_list_values(table.column(name)) for name in _COLUMNS]
            rows = [PackedRow(*values) for values in zip(*columns, strict=True)]
            for offset, row in enumerate(rows):
                _check_row(row, self._vocab_size, f"{path} row {self._first_rows[group] + offset}")
            self._cache[group] = rows
        self._cache.move_to_end(group)
        if len(self._cache) > _CACHED_GROUPS:
            self._cache.popitem(last=False)
        return self._cache[group]


def epoch_order(first_rows: Sequence[int], *, seed: int) -> np.ndarray:
    """Return the rows of one epoch in the order of training; the same at every layout.

    The row groups are shuffled; each ``WINDOW_GROUPS`` of them form a window, and the rows of a
    window are shuffled. With a single window that is a plain permutation,
    ``torch.randperm(num_rows, seed)``. The rows after an epoch's last whole global batch are not
    used; they are others in every epoch.

    Args:
        first_rows: First row of each row group, followed by the number of rows.
        seed: Seed of the epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = np.arange(len(first_rows) - 1)
    if len(groups) > WINDOW_GROUPS:
        groups = torch.randperm(len(groups), generator=generator).numpy()
    windows = []
    for start in range(0, len(groups), WINDOW_GROUPS):
        window = groups[start : start + WINDOW_GROUPS].tolist()
        rows = np.concatenate([np.arange(first_rows[i], first_rows[i + 1]) for i in window])
        windows.append(rows[torch.randperm(len(rows), generator=generator).numpy()])
    return np.concatenate([np.empty(0, np.int64), *windows])


def split_batch(
    rows: Sequence[int], *, micro_batch_size: int, data_rank: int, data_size: int
) -> list[list[tuple[int, int]]]:
    """Return a rank's micro batches as (position in the global batch, row number).

    Whole micro batches are dealt out to the ranks, so that no layout decides which rows share one.
    """
    pairs = list(enumerate(rows))
    starts = range(0, len(pairs), micro_batch_size)
    micro_batches = [pairs[start : start + micro_batch_size] for start in starts]
    return micro_batches[data_rank::data_size]


def collate(rows: Sequence[PackedRow]) -> MicroBatch:
    """Return rows as one micro batch; every document loses its last token, which is a label."""
    tokens, labels, masks, lengths, row_tokens = [], [], [], [0], []
    for row in rows:
        bounds = [*row.seq_start_id.tolist(), len(row.input_ids)]
        documents = [(start, stop) for start, stop in pairwise(bounds) if stop - start > 1]
        for start, stop in documents:
            tokens.append(row.input_ids[start : stop - 1])
            labels.append(row.input_ids[start + 1 : stop])
            masks.append(row.loss_mask[start : stop - 1])
            lengths.append(stop - start - 1)
        row_tokens.append(sum(stop - start - 1 for start, stop in documents))
    supervised = np.flatnonzero(np.concatenate(masks))
    return MicroBatch(
        tokens=_to_tensor(np.concatenate(tokens)),
        labels=_to_tensor(np.concatenate(labels)[supervised]),
        supervised=_to_tensor(supervised),
        cu_seqlens=tuple(np.cumsum(lengths).tolist()),
        row_tokens=tuple(row_tokens),
    )


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRowError(f"{path} is not a readable Parquet file: {error}") from None


def _list_values(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return a list column as one numpy view per row, without copying."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False)
    offsets = array.offsets.to_numpy()
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _check_row(row: PackedRow, vocab_size: int, where: str) -> None:
    starts, num_tokens = row.seq_start_id, len(row.input_ids)
    if num_tokens == 0 or len(row.loss_mask) != num_tokens:
        raise BadRowError(
            f"{where}: {num_tokens} input_ids but {len(row.loss_mask)} loss_mask values"
        )
    is_rising = bool((np.diff(starts) > 0).all())
    if len(starts) == 0 or starts[0] != 0 or starts[-1] >= num_tokens or not is_rising:
        raise BadRowError(f"{where}: seq_start_id does not increase from 0 to below {num_tokens}")
    if num_tokens == len(starts):
        raise BadRowError(f"{where}: no document has two tokens, so there is nothing to predict")
    if row.input_ids.min() < 0 or row.input_ids.max() >= vocab_size:
        raise BadRowError(f"{where}: a token id is outside the vocabulary of {vocab_size}")
