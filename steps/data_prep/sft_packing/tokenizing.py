"""The task of the first stage: tokenizes a part of a file into spools, with a receipt."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.conversations import (
    ALPACA_FIELDS,
    PAIR_FIELDS,
    SHAREGPT,
    Conversation,
    detect_field,
    read_conversation,
)
from nemotron.steps.data_prep.sft_packing.inputs import Part
from nemotron.steps.data_prep.sft_packing.masks import Encoder, build_encoder
from nemotron.steps.data_prep.sft_packing.reasoning import Reasoning
from nemotron.steps.data_prep.sft_packing.receipts import Receipt, done_or, write_receipt
from nemotron.steps.data_prep.sft_packing.rejects import SAMPLES_PER_REASON, BadRowError
from nemotron.steps.data_prep.sft_packing.rows import BLANK, PLACES, Row, read_rows
from nemotron.steps.data_prep.sft_packing.spool import SpoolWriter
from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer, load_tokenizer

BATCH_ROWS = 512
BATCH_BYTES = 512 << 10


@dataclass(frozen=True)
class EncoderSettings:
    """What makes an encoder: plain values, so that they travel to other processes.

    Attributes:
        tokenizer: Directory of the tokenizer.
        tokenizer_blake3: Digest of the tokenizer.
        special_tokens: Its special tokens by name, which other files than tokenizer.json say.
        chat_template: Text of the template.
        add_bos: See ``masks.Encoder``.
        add_eos: See ``masks.Encoder``.
        reasoning: See ``masks.Encoder``.
        sanitize: See ``masks.build_encoder``.
        engine: See ``masks.build_encoder``.
        today: See ``masks.build_encoder``.
    """

    tokenizer: str
    tokenizer_blake3: str
    special_tokens: tuple[tuple[str, str], ...]
    chat_template: str
    add_bos: bool
    add_eos: bool
    reasoning: Reasoning
    sanitize: bool
    engine: str
    today: str | None


@dataclass(frozen=True)
class RowSettings:
    """Which rows of a data set are used, and where in a row the conversation is.

    Attributes:
        messages_field: Field of a conversation.
        tools_field: Field of the tool definitions.
        used_in_field: Field that ``used_in_filter`` is looked for in.
        used_in_filter: Keep only rows whose ``used_in_field`` names this; None keeps all.
        max_rows: Tokenize at most this many conversations, those with the smallest hashes.
    """

    messages_field: str
    tools_field: str
    used_in_field: str
    used_in_filter: str | None
    max_rows: int | None


@dataclass(frozen=True)
class TokenizeTask:
    """Tokenizes one part.

    Attributes:
        key: Digest of everything that the result depends on.
        directory: Where the result goes.
        part: What to read.
        size_bytes: About how much work it is.
        rows: Which rows are used, and which of their fields.
        encoder: Settings of the encoder.
    """

    key: str
    directory: Path
    part: Part
    size_bytes: int
    rows: RowSettings
    encoder: EncoderSettings

    def run(self) -> tuple[Receipt, bool]:
        """Return the receipt, and whether it was there already.

        Raises:
            NemotronError: ``unreadable_input``, ``malformed_list``.
            EngineMismatchError: ``kitoken`` differs from ``tokenizers``.
        """
        return done_or(self.directory, self.key, self._work)

    def _work(self) -> Receipt:
        writer = SpoolWriter(self.directory, self.key)
        tally = _Tally(PLACES[self.part.kind])
        found = _conversations(self.part, self.rows, tally)
        encoder = encoder_of(self.encoder)
        for batch in _batches(_limited(found, self.rows.max_rows, tally)):
            tally.rendered += len(batch)
            encoded = encoder.encode([item.conversation for item in batch])
            for item, documents in zip(batch, encoded, strict=True):
                if isinstance(documents, BadRowError):
                    tally.refused += 1
                    tally.drop(item.row.position, documents)
                else:
                    writer.add(documents, uid=item.conversation.uid, row=item.row.position)
                    tally.documents += len(documents)
                    tally.tokens += sum(len(document.tokens) for document in documents)
        writer.flush()
        content = {"spools": writer.names, **tally.content()}
        return write_receipt(self.directory, self.key, content, files=writer.files)


_encoders: dict[EncoderSettings, Encoder] = {}


def encoder_of(settings: EncoderSettings, tokenizer: ChatTokenizer | None = None) -> Encoder:
    """Return the encoder for some settings, which each process builds only once.

    Raises:
        NemotronError: ``tokenizer_mismatch``: the tokenizer changed since the run was planned.
    """
    if settings not in _encoders:
        _encoders.clear()
        _encoders[settings] = _build(settings, tokenizer or load_tokenizer(settings.tokenizer))
    return _encoders[settings]


def _build(settings: EncoderSettings, tokenizer: ChatTokenizer) -> Encoder:
    is_same = tokenizer.blake3 == settings.tokenizer_blake3
    if not is_same or tuple(tokenizer.variables.items()) != settings.special_tokens:
        problem = "it changed during the run"
        raise step_error(STEP, "tokenizer_mismatch", problem, where=settings.tokenizer)
    return build_encoder(
        tokenizer=tokenizer,
        chat_template=settings.chat_template,
        add_bos=settings.add_bos,
        add_eos=settings.add_eos,
        reasoning=settings.reasoning,
        sanitize=settings.sanitize,
        engine=settings.engine,
        today=settings.today,
    )


@dataclass
class _Tally:
    """What became of a part's rows; ``refused`` are those that were ``rendered`` but unusable."""

    place: str
    positions: int = 0
    rows_read: int = 0
    rendered: int = 0
    refused: int = 0
    documents: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.samples: list[dict[str, Any]] = []

    def drop(self, position: int, error: BadRowError) -> None:
        """Count a row as dropped; keep its place unless its reason has enough samples."""
        self.dropped[error.reason] += 1
        if self.dropped[error.reason] <= SAMPLES_PER_REASON:
            sample = {"position": position, "reason": error.reason, "detail": error.detail}
            self.samples.append(sample)

    def content(self) -> dict[str, Any]:
        samples = sorted(self.samples, key=lambda sample: sample["position"])
        return {
            "place": self.place,
            "positions": self.positions,
            "rows_read": self.rows_read,
            "rendered": self.rendered,
            "refused": self.refused,
            "documents": self.documents,
            "tokens": self.tokens,
            "dropped": dict(self.dropped),
            "samples": samples,
        }


class _Found(NamedTuple):
    conversation: Conversation
    row: Row


def _conversations(part: Part, settings: RowSettings, tally: _Tally) -> Iterator[_Found]:
    """Yield the usable conversations of a part, and count the rest."""
    columns = (
        *(settings.messages_field, SHAREGPT, *ALPACA_FIELDS, *PAIR_FIELDS),
        *(settings.tools_field, settings.used_in_field),
    )
    for row in read_rows(part, columns=columns):
        tally.positions = row.position + 1
        if row.value is BLANK:
            continue
        tally.rows_read += 1
        try:
            yield _Found(_conversation(row, settings), row)
        except BadRowError as error:
            tally.drop(row.position, error)
        except RecursionError:
            tally.drop(row.position, BadRowError("malformed_json", "nested too deeply"))


def _conversation(row: Row, settings: RowSettings) -> Conversation:
    value = row.value
    if isinstance(value, BadRowError):
        raise value
    if not isinstance(value, dict):
        raise BadRowError("not_an_object", f"the row is of type {type(value).__name__}")
    _require_used_in(value, settings.used_in_field, settings.used_in_filter)
    field = detect_field(value, messages_field=settings.messages_field)
    if field is None:
        raise BadRowError("no_conversation", f"no field {settings.messages_field!r}")
    return read_conversation(value, field=field, tools_field=settings.tools_field)


def _require_used_in(value: dict[str, Any], used_in_field: str, wanted: str | None) -> None:
    """Refuse a row that does not name a use: as a word, as words between commas, or in a list."""
    if wanted is None:
        return
    uses = value.get(used_in_field)
    if isinstance(uses, str):
        uses = [uses, *(part.strip() for part in uses.split(","))]
    if not isinstance(uses, list) or wanted not in uses:
        raise BadRowError("used_in", f"{used_in_field} does not name {wanted!r}")


def _limited(found: Iterator[_Found], max_rows: int | None, tally: _Tally) -> Iterable[_Found]:
    """Return the ``max_rows`` conversations with the smallest hashes, in the order of the part."""
    if max_rows is None:
        return found
    chosen = heapq.nsmallest(max_rows, found, key=lambda item: item.conversation.uid)
    usable = tally.rows_read - tally.dropped.total()
    if usable > len(chosen):
        tally.dropped["max_rows"] += usable - len(chosen)
    return sorted(chosen, key=lambda item: item.row.position)


def _batches(found: Iterable[_Found]) -> Iterator[list[_Found]]:
    batch: list[_Found] = []
    size_bytes = 0
    for item in found:
        batch.append(item)
        size_bytes += item.row.size_bytes
        if len(batch) == BATCH_ROWS or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
