"""Data sets to tokenized documents: read, filter, encode, and account for every row."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP, Dataset
from nemotron.steps.data_prep.sft_packing.conversations import (
    Conversation,
    detect_field,
    read_conversation,
)
from nemotron.steps.data_prep.sft_packing.documents import (
    Documents,
    DocumentsBuilder,
    blend_counts,
    concatenate,
    smallest_hashes,
)
from nemotron.steps.data_prep.sft_packing.inputs import Row, list_files, read_rows
from nemotron.steps.data_prep.sft_packing.masks import Encoder
from nemotron.steps.data_prep.sft_packing.rejects import BY_CONFIG, BadRowError, Rejects

BATCH = 512


@dataclass
class Source:
    """One data set and what became of its rows: ``rows_read`` is kept plus dropped.

    Attributes:
        dataset: What the blend says.
        rows_read: Rows seen.
        rejects: Rows that were dropped, by reason.
        documents: The documents that are left.
    """

    dataset: Dataset
    documents: Documents
    rows_read: int = 0
    rejects: Rejects = field(default_factory=Rejects)

    def drop(self, row: Row, error: BadRowError) -> None:
        """Count a row that is not used."""
        self.rejects.add(error, file=row.file, place=row.place, position=row.position)

    def keep(self, chosen: np.ndarray, reason: str) -> None:
        """Keep only some of the documents."""
        dropped = len(self.documents) - len(chosen)
        if dropped:
            self.rejects.counts[reason] += dropped
            self.documents = self.documents.take(chosen)


class Progress:
    """Says every few seconds how many rows were read, and how fast."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._start = self._last = time.monotonic()
        self._rows = 0

    def advance(self) -> None:
        """Count one row."""
        self._rows += 1
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            rate = self._rows / (now - self._start)
            print(f"{STEP}: {self._rows:,} rows read, {rate:,.0f} rows/s", flush=True)


class _Found(NamedTuple):
    conversation: Conversation
    number: int
    row: Row


def read_corpus(
    datasets: Sequence[Dataset],
    *,
    encoder: Encoder,
    used_in_field: str,
    used_in_filter: str | None,
    sample: str | None,
    sample_seed: int,
    max_bad_fraction: float,
    progress_interval_s: float,
) -> list[Source]:
    """Return the tokenized documents of a blend, data set by data set.

    Args:
        datasets: The data sets; one of weight 0 is not read.
        encoder: Turns conversations into documents.
        used_in_field: Field that ``used_in_filter`` looks at.
        used_in_filter: Keep only rows that name this there; None keeps all.
        sample: Share of each data set's documents, such as ``10%``; None for all.
        sample_seed: Decides which documents ``sample`` takes.
        max_bad_fraction: Share of a data set's rows that may be unusable, in [0, 1].
        progress_interval_s: Seconds between lines about the progress.

    Raises:
        NemotronError: ``missing_training_data``, ``bad_rows``, ``bad_loss_masks``,
            ``seq_length_mismatch``: no document fits.
    """
    progress = Progress(progress_interval_s)
    sources = [Source(item, DocumentsBuilder().build()) for item in datasets if item.weight > 0]
    for source in sources:
        found = _conversations(
            source,
            used_in_field=used_in_field,
            used_in_filter=used_in_filter,
            progress=progress,
        )
        _encode(_limited(found, source, source.dataset.max_rows), source, encoder)
        _require_good_rows(source, max_bad_fraction)
        if sample is not None:
            count = round(len(source.documents) * float(sample.rstrip("%")) / 100)
            source.keep(smallest_hashes(source.documents.uids, count, seed=sample_seed), "sample")
        _require_documents(source)
    counts = blend_counts(
        [len(source.documents) for source in sources],
        [source.dataset.weight for source in sources],
    )
    for source, count in zip(sources, counts, strict=True):
        source.keep(smallest_hashes(source.documents.uids, count), "weight")
    return sources


def all_documents(sources: Sequence[Source]) -> Documents:
    """Return the documents of all data sets, in the order of the blend."""
    return concatenate([source.documents for source in sources])


def _conversations(
    source: Source,
    *,
    used_in_field: str,
    used_in_filter: str | None,
    progress: Progress,
) -> Iterator[_Found]:
    """Yield the usable conversations of a data set; the first row that has one sets the field."""
    messages_field, tools_field = source.dataset.messages_field, source.dataset.tools_field
    field_name: str | None = None
    rows = (row for file in list_files(source.dataset) for row in read_rows(file))
    for row in rows:
        source.rows_read += 1
        progress.advance()
        try:
            value = _value(row)
            _require_used_in(value, used_in_field, used_in_filter)
            if field_name is None:
                field_name = detect_field(value, messages_field=messages_field)
            if field_name is None:
                raise BadRowError("no_conversation", f"no field {messages_field!r}")
            conversation = read_conversation(value, field=field_name, tools_field=tools_field)
        except BadRowError as error:
            source.drop(row, error)
        except RecursionError:
            source.drop(row, BadRowError("malformed_json", "nested too deeply"))
        else:
            yield _Found(conversation, source.rows_read, row)


def _value(row: Row) -> dict[str, Any]:
    if isinstance(row.value, BadRowError):
        raise row.value
    if not isinstance(row.value, dict):
        raise BadRowError("not_an_object", f"the row is of type {type(row.value).__name__}")
    return row.value


def _require_used_in(value: dict[str, Any], used_in_field: str, wanted: str | None) -> None:
    """A row names its uses as one word, as words between commas, or as a list."""
    if wanted is None:
        return
    uses = value.get(used_in_field)
    if isinstance(uses, str):
        uses = [uses, *(part.strip() for part in uses.split(","))]
    if not isinstance(uses, list) or wanted not in uses:
        raise BadRowError("used_in", f"{used_in_field} does not name {wanted!r}")


def _limited(found: Iterator[_Found], source: Source, max_rows: int | None) -> Iterable[_Found]:
    """Return at most ``max_rows`` conversations in their order, holding no more than that many."""
    if max_rows is None:
        return found
    chosen = heapq.nsmallest(max_rows, found, key=lambda item: item.conversation.uid)
    usable = source.rows_read - source.rejects.counts.total()
    if usable > len(chosen):
        source.rejects.counts["max_rows"] += usable - len(chosen)
    return sorted(chosen, key=lambda item: item.number)


def _encode(found: Iterable[_Found], source: Source, encoder: Encoder) -> None:
    builder = DocumentsBuilder()
    stream = iter(found)
    while batch := list(islice(stream, BATCH)):
        encoded = encoder.encode([item.conversation for item in batch])
        for item, document in zip(batch, encoded, strict=True):
            if isinstance(document, BadRowError):
                source.drop(item.row, document)
            else:
                builder.add(document, uid=item.conversation.uid)
    source.documents = builder.build()


def _require_good_rows(source: Source, max_bad_fraction: float) -> None:
    rejects = source.rejects
    if rejects.num_bad <= max_bad_fraction * source.rows_read:
        return
    share = rejects.num_bad / source.rows_read
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.counts.most_common(3))
    example = next(item for item in rejects.samples if item["reason"] not in BY_CONFIG)
    where = f"{example['file']}:{example.get('line', example.get('item'))}"
    # Almost every row without a trained token is the template's doing, not the data's.
    is_masks = rejects.counts["no_trainable_tokens"] * 2 > rejects.num_bad
    problem = (
        f"{rejects.num_bad} of {source.rows_read} rows ({share:.1%}) of the data set "
        f"{source.dataset.name} cannot be used; max_bad_fraction is {max_bad_fraction:g}: "
        f"{reasons}; the first: {example['detail']}"
    )
    raise step_error(STEP, "bad_loss_masks" if is_masks else "bad_rows", problem, where=where)


def _require_documents(source: Source) -> None:
    if len(source.documents):
        return
    counts = source.rejects.counts
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    problem = f"none of the {source.rows_read} rows is left ({reasons or 'the files are empty'})"
    is_length = counts["over_long"] * 2 > source.rows_read
    name = "seq_length_mismatch" if is_length else "missing_training_data"
    raise step_error(STEP, name, problem, where=source.dataset.name)
