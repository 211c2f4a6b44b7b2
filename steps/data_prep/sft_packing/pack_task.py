"""The task of the second stage: packs spooled documents into finished shards, with a receipt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.documents import Documents, ranges
from nemotron.steps.data_prep.sft_packing.long_documents import LongDocuments, fit, survives
from nemotron.steps.data_prep.sft_packing.packing import Rows, pack
from nemotron.steps.data_prep.sft_packing.parquet import ShardWriter
from nemotron.steps.data_prep.sft_packing.receipts import Receipt, aside, done_or, write_receipt
from nemotron.steps.data_prep.sft_packing.spool import map_index, map_tokens


@dataclass(frozen=True)
class PackSettings:
    """How documents become rows and rows become files.

    Attributes:
        pack_size: Tokens of a row at training time.
        algorithm: See ``packing.pack``.
        seed: Seed of packing.
        pad_seq_to_mult: Documents are padded to a multiple of this at training time.
        long_documents: What becomes of documents longer than ``max_tokens``.
        max_tokens: Most stored tokens of a document.
        stop_token_id: The token that ends a turn, or None.
        pad_id: The token that documents are padded with.
        row_group_size: Rows of a Parquet row group.
        compression: Codec name of pyarrow.
        metadata: Key-value metadata of every file.
    """

    pack_size: int
    algorithm: str
    seed: int
    pad_seq_to_mult: int
    long_documents: LongDocuments
    max_tokens: int
    stop_token_id: int | None
    pad_id: int
    row_group_size: int
    compression: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Conversations that are packed together.

    Attributes:
        spools: Index of each one's spool, int32.
        positions: Each one's index within its spool, uint32.
        datasets: Index of each one's data set, int32.
    """

    spools: np.ndarray
    positions: np.ndarray
    datasets: np.ndarray


@dataclass(frozen=True)
class PackTask:
    """Packs one or more groups of conversations into one or more files.

    Either several groups go into one file, or one group goes into several files.

    Attributes:
        key: Digest of everything that the result depends on.
        directory: Where the result goes.
        spool_directory: Where the spools are.
        spools: Names of all spools.
        split: The split that the files belong to.
        files: Names of the files.
        has_ratio: Whether ratios say how large the split is; numbers of shards otherwise.
        groups: What goes into them.
        size_bytes: How much work it is, about.
        seed: What sets this task apart from others of the same ``settings.seed``.
        settings: How to pack.
    """

    key: str
    directory: Path
    spool_directory: Path
    spools: tuple[str, ...]
    split: str
    files: tuple[str, ...]
    has_ratio: bool
    groups: tuple[Group, ...]
    size_bytes: int
    seed: int
    settings: PackSettings

    def run(self) -> tuple[Receipt, bool]:
        """Return the receipt, and whether it was there already.

        Raises:
            NemotronError: ``too_many_tiny_shards``: fewer rows than files.
        """
        return done_or(self.directory, self.key, self._work)

    def _work(self) -> Receipt:
        names = [f"{self.key}-{number:05d}.parquet" for number in range(len(self.files))]
        counts: Counter[str] = Counter()
        sizes: list[np.ndarray] = []
        longest, shortest_row = 0, self.settings.pack_size
        realised: dict[int, Counter[str]] = {}
        with ExitStack() as stack:
            paths = [stack.enter_context(aside(self.directory / name)) for name in names]
            writers = [self._writer(path) for path in paths]
            for number, group in enumerate(self.groups):
                gathered = self._gather(group)
                rows = self._pack(gathered.documents, number)
                self._require_rows(rows)
                bounds = np.linspace(0, rows.num_rows, len(writers) + 1).astype(np.int64)
                for writer, first, last in zip(writers, bounds[:-1], bounds[1:], strict=True):
                    part = Rows(rows.documents, rows.starts[first : last + 1])
                    writer.write(gathered.documents, part)
                counts.update(gathered.counts)
                counts["conversations"] += len(group.positions)
                sizes.append(np.diff(rows.starts))
                lengths = gathered.documents.runtime_lengths
                of_rows = np.add.reduceat(lengths[rows.documents], rows.starts[:-1])
                longest = max(longest, int(lengths.max()))
                shortest_row = min(shortest_row, int(of_rows.min()))
                _count_by_dataset(realised, gathered)
            for writer in writers:
                counts.update(writer.close())
        documents_per_row = Counter(np.concatenate(sizes).tolist())
        content = {
            "split": self.split,
            "names": dict(zip(self.files, names, strict=True)),
            "counts": dict(counts),
            "longest_document": longest,
            "shortest_row": shortest_row,
            "documents_per_row": sorted(documents_per_row.items()),
            "datasets": {str(number): dict(found) for number, found in realised.items()},
        }
        return write_receipt(self.directory, self.key, content, files=names)

    def _writer(self, path: Path) -> ShardWriter:
        return ShardWriter(
            path,
            row_group_size=self.settings.row_group_size,
            compression=self.settings.compression,
            metadata={**self.settings.metadata, "split": self.split},
        )

    def _pack(self, documents: Documents, number: int) -> Rows:
        return pack(
            documents.runtime_lengths,
            capacity=self.settings.pack_size,
            algorithm=self.settings.algorithm,
            seed=[self.settings.seed & 0xFFFF_FFFF, self.seed, number],
        )

    def _require_rows(self, rows: Rows) -> None:
        if len(self.files) <= rows.num_rows:
            return
        fitting = max(1, rows.num_rows // self.settings.row_group_size)
        problem = (
            f"num_shards is {len(self.files)}, but the {self.split} split has {rows.num_rows} "
            f"row(s); num_shards={fitting} would fill them"
        )
        if not self.has_ratio:
            problem = (
                f"the {self.split} split has {rows.num_rows} row(s) for {len(self.files)} files; "
                "valid_shards=null test_shards=null num_shards=1 gives every split one file, and "
                "as many rows as its ratio says"
            )
        raise step_error(STEP, "too_many_tiny_shards", problem, where=self.split)

    def _gather(self, group: Group) -> _Gathered:
        """Return the documents of a group, in its order, cut to fit."""
        settings = self.settings
        found = self._find(group)
        tokens, offsets = self._read(found)
        fitted = fit(
            tokens,
            offsets,
            policy=settings.long_documents,
            max_tokens=settings.max_tokens,
            stop_token_id=settings.stop_token_id,
        )
        documents = Documents(tokens, fitted.starts, fitted.lengths)
        padded = documents.padded(settings.pad_seq_to_mult, pad_id=settings.pad_id)
        fitted.counts["pad_tokens"] += int((padded.lengths - documents.lengths).sum())
        owners = found.owners[fitted.origins]
        return _Gathered(padded, group.datasets[owners], fitted.counts)

    def _find(self, group: Group) -> _Found:
        """Return where the documents of a group are, in its order."""
        parts: list[_Found] = []
        for spool, owners in _by_number(group.spools):
            conversations, documents = map_index(self.spool_directory, self.spools[spool])
            mine = conversations[group.positions[owners]]
            counts = mine["num_documents"].astype(np.int64)
            chosen = documents[ranges(mine["first_document"], counts)]
            lengths = chosen["length"].astype(np.int64)
            alive = survives(
                lengths,
                chosen["first_trained"],
                policy=self.settings.long_documents,
                max_tokens=self.settings.max_tokens,
            )
            of_conversation = np.repeat(owners, counts)[alive]
            spools = np.full(len(of_conversation), spool)
            parts.append(_Found(of_conversation, spools, chosen["start"][alive], lengths[alive]))
        joined = _Found(*map(np.concatenate, zip(*parts, strict=True)))
        order = np.argsort(joined.owners, kind="stable")
        return _Found(*(array[order] for array in joined))

    def _read(self, found: _Found) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.append(0, np.cumsum(found.lengths))
        tokens = np.empty(offsets[-1], dtype=np.int32)
        for spool, mine in _by_number(found.spools):
            held = map_tokens(self.spool_directory, self.spools[spool])
            places = zip(
                offsets[mine].tolist(),
                found.starts[mine].tolist(),
                found.lengths[mine].tolist(),
                strict=True,
            )
            for place, start, length in places:
                tokens[place : place + length] = held[start : start + length]
        return tokens, offsets


class _Found(NamedTuple):
    """Documents in spools: index of the conversation, of the spool, first token, stored tokens."""

    owners: np.ndarray
    spools: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class _Gathered(NamedTuple):
    """Documents ready to pack, the data set of each, and counts of what was cut."""

    documents: Documents
    datasets: np.ndarray
    counts: Counter[str]


def _by_number(numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield every distinct number with the indices where it occurs, both ascending."""
    order = np.argsort(numbers, kind="stable")
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    for places in np.split(order, cuts):
        yield int(numbers[places[0]]), places


def _count_by_dataset(realised: dict[int, Counter[str]], gathered: _Gathered) -> None:
    sums: Sequence[tuple[str, np.ndarray]] = (
        ("documents", np.ones(len(gathered.documents), dtype=np.int64)),
        ("tokens", gathered.documents.lengths),
        ("supervised_tokens", gathered.documents.supervised_tokens),
    )
    for dataset, mine in _by_number(gathered.datasets):
        found = realised.setdefault(dataset, Counter())
        found.update({name: int(values[mine].sum()) for name, values in sums})
