"""Rows from Parquet to micro batches, by the collate contract."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps._training.batches import (
    WINDOW_GROUPS,
    BadRowError,
    PackedRow,
    PackedSplit,
    collate,
    epoch_order,
    split_batch,
)

CPU = torch.device("cpu")


def row(ids: list[int], mask: list[int], starts: list[int]) -> PackedRow:
    return PackedRow(np.array(ids, np.int32), np.array(mask, np.uint8), np.array(starts, np.int32))


def test_every_document_loses_its_last_token_and_never_predicts_the_next_document() -> None:
    packed = row([5, 6, 7, 8, 9], [0, 1, 0, 1, 0], [0, 3])
    batch = collate([packed])
    assert batch.tokens.tolist() == [5, 6, 8]
    assert batch.cu_seqlens == (0, 2, 3)
    assert batch.supervised.tolist() == [1, 2]
    assert batch.labels.tolist() == [7, 9]


def test_rows_of_a_micro_batch_stand_one_after_the_other() -> None:
    rows = [row([1, 2, 3], [1, 1, 0], [0]), row([4, 5], [1, 0], [0])]
    batch = collate(rows)
    assert batch.tokens.tolist() == [1, 2, 4]
    assert batch.cu_seqlens == (0, 2, 3)
    assert batch.row_tokens == (2, 1)


def test_an_epoch_uses_every_row_once_and_the_next_one_another_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row([i, i], [1, 0], [0]) for i in range(10)])
    split = PackedSplit(tmp_path, vocab_size=10)
    batches = [split.global_batch(i, global_batch_size=3, seed=1) for i in range(6)]
    first, second = ([*chain(*batches[k : k + 3])] for k in (0, 3))
    assert len(set(first)) == len(set(second)) == 9  # one row is left over, another each time
    assert first != second


def test_a_small_split_is_permuted_as_a_whole() -> None:
    wanted = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert epoch_order([0, 4, 8, 10], seed=3).tolist() == wanted.tolist()


@given(sizes=st.lists(st.integers(1, 5), max_size=40), seed=st.integers(0, 2**32))
def test_a_large_split_is_permuted_window_by_window(sizes: list[int], seed: int) -> None:
    first_rows = [0, *np.cumsum(np.array(sizes, dtype=int)).tolist()]
    order = epoch_order(first_rows, seed=seed)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    groups = (np.searchsorted(first_rows, order, side="right") - 1).tolist()
    last = {group: place for place, group in enumerate(groups)}
    is_open: set[int] = set()
    for place, group in enumerate(groups):
        is_open.add(group)
        assert len(is_open) <= WINDOW_GROUPS
        is_open -= {group} if last[group] == place else set()


def test_an_epoch_of_a_large_split_decodes_every_row_group_once(tmp_path: Path) -> None:
    rows = [row([i % 8, i % 8], [1, 0], [0]) for i in range(4 * WINDOW_GROUPS * 2)]
    write(tmp_path / "a.parquet", rows)
    split = PackedSplit(tmp_path, vocab_size=8)
    decoded: list[int] = []
    for index in split.global_batch(0, global_batch_size=len(rows), seed=0):
        held = set(split._cache)
        assert int(split[index].input_ids[0]) == index % 8
        decoded += set(split._cache) - held
    assert sorted(decoded) == list(range(4 * WINDOW_GROUPS))


def test_ranks_share_the_global_batch_without_overlap() -> None:
    rows = [7, 3, 5, 1]
    shares = [split_batch(rows, micro_batch_size=1, data_rank=rank, data_size=2) for rank in (0, 1)]
    assert shares == [[[(0, 7)], [(2, 5)]], [[(1, 3)], [(3, 1)]]]


def test_the_same_rows_share_a_micro_batch_on_any_number_of_ranks() -> None:
    rows = [7, 3, 5, 1]
    alone = split_batch(rows, micro_batch_size=2, data_rank=0, data_size=1)
    shares = [split_batch(rows, micro_batch_size=2, data_rank=rank, data_size=2) for rank in (0, 1)]
    assert alone == [[(0, 7), (1, 3)], [(2, 5), (3, 1)]] == [pair for [pair] in shares]


def write(path: Path, rows: list[PackedRow]) -> None:
    columns = [[getattr(each, name) for each in rows] for name in PackedRow.__dataclass_fields__]
    types = (pa.int32(), pa.uint8(), pa.int32())
    arrays = [pa.array(c, pa.list_(t)) for c, t in zip(columns, types, strict=True)]
    table = pa.table(arrays, names=list(PackedRow.__dataclass_fields__))
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True)


def test_a_split_is_all_its_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", [row([i, i], [1, 0], [0]) for i in range(5, 8)])
    write(tmp_path / "a.parquet", [row([i, i], [1, 0], [0]) for i in range(5)])
    split = PackedSplit(tmp_path, vocab_size=8)
    assert len(split) == 8
    assert [int(split[i].input_ids[0]) for i in range(8)] == list(range(8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row([1, 2], [1], [0]), "2 input_ids but 1 loss_mask values"),
        (row([1, 2], [1, 0], [1]), "does not increase from 0"),
        (row([1, 2, 3], [1, 0, 0], [0, 2, 2]), "does not increase from 0"),
        (row([1, 2], [1, 0], []), "does not increase from 0"),
        (row([1, 9], [1, 0], [0]), "outside the vocabulary of 8"),
        (row([1, -1], [1, 0], [0]), "outside the vocabulary of 8"),
        (row([1, 2], [0, 0], [0, 1]), "no document has two tokens"),
    ],
)
def test_a_row_that_breaks_the_contract_is_refused_by_file_and_row(
    tmp_path: Path, bad: PackedRow, message: str
) -> None:
    write(tmp_path / "a.parquet", [row([1, 2], [1, 0], [0]), bad])
    with pytest.raises(BadRowError, match=rf"a\.parquet row 1: .*{message}"):
        PackedSplit(tmp_path, vocab_size=8)[0]


def test_a_cut_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [row([1, 2], [1, 0], [0])])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadRowError, match=r"a\.parquet is not a readable Parquet file"):
        PackedSplit(tmp_path, vocab_size=8)


def test_a_file_without_a_column_is_refused_by_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1]], "loss_mask": [[0]]}), tmp_path / "a.parquet")
    with pytest.raises(BadRowError, match="no column seq_start_id"):
        PackedSplit(tmp_path, vocab_size=8)
