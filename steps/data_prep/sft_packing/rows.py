"""Reads the rows of a part of a file, each with its place; a row that does not parse says why.

A row larger than ``MAX_ROW_BYTES`` is never held: a missing newline must not fill the memory.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.inputs import (
    BYTE_ORDER_MARK,
    Part,
    open_bytes,
    unreadable,
)
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError

MAX_ROW_BYTES = 16 << 20
PLACES = {"lines": "line", "list": "item", "parquet": "row"}
# A blank line: it is no row, but counts in the numbers of the lines after it.
BLANK = BadRowError("blank", "")
_PARQUET_BATCH = 256
_LIST_CHUNK = 1 << 20
_SPACE = " \t\n\r"


class Row(NamedTuple):
    """One row of a part.

    Attributes:
        position: Index of the line, item or row within the part.
        value: The parsed row, or why it does not parse.
        size_bytes: About how many bytes of text it is.
    """

    position: int
    value: Any | BadRowError
    size_bytes: int


def read_rows(part: Part, *, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a part; a blank line comes as ``BLANK``.

    Args:
        part: What to read.
        columns: Of a Parquet file only these columns are read, where they exist.

    Raises:
        NemotronError: ``unreadable_input``; ``malformed_list``: a JSON list that does not parse, of
            which nothing after the fault can be read.
    """
    read = {"lines": _read_lines, "list": _read_list}.get(part.kind)
    try:
        yield from read(part) if read else _read_parquet(part, columns)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise unreadable(part.path, error) from None


def _read_lines(part: Part) -> Iterator[Row]:
    with open_bytes(part.path) as stream:
        if part.start:
            stream.seek(part.start)
        left = part.stop - part.start if part.stop is not None else None
        position = 0
        while left is None or left > 0:
            line, size_bytes = _next_line(stream)
            if size_bytes == 0:
                return
            if left is not None:
                left -= size_bytes
            if line is None:
                problem = f"{size_bytes} bytes; at most {MAX_ROW_BYTES} are read"
                yield Row(position, BadRowError("row_too_large", problem), 0)
            else:
                text = line.removeprefix(BYTE_ORDER_MARK) if position == part.start == 0 else line
                is_blank = not text or text.isspace()
                yield Row(position, BLANK if is_blank else parse(text), size_bytes)
            position += 1


def _next_line(stream: io.BufferedIOBase) -> tuple[bytes | None, int]:
    """Return the next line and its size; None in place of a line that is too large to hold."""
    line = stream.readline(MAX_ROW_BYTES)
    size_bytes = len(line)
    if size_bytes < MAX_ROW_BYTES or line.endswith(b"\n"):
        return line, size_bytes
    while rest := stream.readline(MAX_ROW_BYTES):
        size_bytes += len(rest)
        if rest.endswith(b"\n"):
            break
    return None, size_bytes


def parse(text: bytes | str) -> Any | BadRowError:
    """Return the value of one JSON text, or why it has none.

    Stricter than ``json``, which accepts NaN and Infinity, and silently keeps the last of two equal
    keys in an object.
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError("invalid_unicode", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        if text.strip() in (b"[", "["):
            problem = (
                "a list begins here, but each line holds one row; lists are read from .json files"
            )
            return BadRowError("malformed_json", problem)
        return BadRowError("malformed_json", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRowError("malformed_json", str(error))


def _read_list(part: Part) -> Iterator[Row]:
    """Yield the items of a JSON list while it is read, holding about one item."""
    reader = _ListReader(part)
    for position, (value, size_bytes) in enumerate(reader.items()):
        yield Row(position, value, size_bytes)


class _ListReader:
    """Reads a JSON list item by item; ``fail`` names the line."""

    def __init__(self, part: Part) -> None:
        self._path = part.path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._lines = 1  # of what was dropped from the front of the text

    def items(self) -> Iterator[tuple[Any, int]]:
        with open_bytes(self._path) as stream:
            position = self._skip(stream, 0) + 1  # the planner saw the bracket
            position = self._skip(stream, position)
            while self._at(position) != "]":
                value, end = self._item(stream, position)
                yield value, end - position
                position = self._skip(stream, end)
                if self._at(position) == ",":
                    position = self._skip(stream, position + 1)
                    if self._at(position) == "]":
                        self._fail("Illegal trailing comma before end of list", position)
                elif self._at(position) != "]":
                    self._fail("Expecting ',' delimiter", position)
                if position > _LIST_CHUNK:
                    position = self._forget(position)
            position = self._skip(stream, position + 1)
            if self._at(position):
                self._fail("Extra data after the list", position)

    def _item(self, stream: io.BufferedIOBase, position: int) -> tuple[Any, int]:
        while True:
            try:
                value, end = _decode_item(self._text, position)
            except json.JSONDecodeError as error:
                message, place = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                self._fail(str(error), position)
            else:
                # A number at the end of what is read may go on.
                if end < len(self._text) or not self._more(stream):
                    return value, end
                continue
            if len(self._text) - position > MAX_ROW_BYTES:
                self._fail(f"an item of more than {MAX_ROW_BYTES} bytes, or {message}", position)
            if not self._more(stream):
                self._fail(message, place)

    def _skip(self, stream: io.BufferedIOBase, position: int) -> int:
        while True:
            while position < len(self._text) and self._text[position] in _SPACE:
                position += 1
            if position < len(self._text) or not self._more(stream):
                return position

    def _at(self, position: int) -> str:
        return self._text[position : position + 1]

    def _more(self, stream: io.BufferedIOBase) -> bool:
        """Read about as much again as is held, so that a long item is tried few times."""
        chunk = stream.read(max(_LIST_CHUNK, len(self._text)))
        try:
            self._text += self._decode.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            self._fail("not UTF-8", len(self._text))
        return bool(chunk)

    def _forget(self, position: int) -> int:
        self._lines += self._text.count("\n", 0, position)
        self._text = self._text[position:]
        return 0

    def _fail(self, message: str, position: int) -> NoReturn:
        line = self._lines + self._text.count("\n", 0, position)
        problem = f"not a JSON list: {message}"
        raise step_error(STEP, "malformed_list", problem, where=f"{self._path}:{line}")


def _decode_item(text: str, position: int) -> tuple[Any, int]:
    """Return the item that begins there, or why it is none of JSON's, and where it ends.

    Raises:
        ValueError: Where it ends cannot be told.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        return BadRowError("malformed_json", str(error)), _ANY_DECODER.raw_decode(text, position)[1]


def _read_parquet(part: Part, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(part.path) as file:
        known = set(file.schema_arrow.names)
        batches = file.iter_batches(
            _PARQUET_BATCH,
            row_groups=list(range(part.start, part.stop or 0)),
            columns=[name for name in columns if name in known],
        )
        position = 0
        for batch in batches:
            size_bytes = batch.nbytes // max(batch.num_rows, 1)
            kind = pa.struct(list(batch.schema))
            has_map = "map<" in str(kind)
            for value in _values(batch):
                # A struct column gives every row all of its keys, null where it had none.
                plain = _with_maps(value, kind) if has_map else _without_nulls(value)
                yield Row(position, plain, size_bytes)
                position += 1


def _values(batch: pa.RecordBatch) -> list[Any | BadRowError]:
    """Return the rows of a batch, each as a value or why it has none.

    Parquet holds more times than Python does, and never looked whether its text is UTF-8.
    """
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            return [
                value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))
            ]
        is_text = isinstance(error, UnicodeDecodeError)
        return [BadRowError("invalid_unicode" if is_text else "unreadable_value", str(error)[:200])]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _with_maps(value: Any | BadRowError, kind: pa.DataType) -> Any | BadRowError:
    """Return a row with objects for its maps, which pyarrow gives as pairs, and without nulls."""
    try:
        return _as_json(value, kind)
    except ValueError as error:
        return BadRowError("unreadable_value", str(error))


def _as_json(value: Any, kind: Any) -> Any:
    kind = getattr(kind, "storage_type", kind)  # of an extension type
    if isinstance(value, dict):
        items = ((field, value[field.name]) for field in kind)
        return {own.name: _as_json(item, own.type) for own, item in items if item is not None}
    if not isinstance(value, list):
        return value
    if pa.types.is_map(kind):  # a map names what it has, so that a null in it was meant
        return _distinct([(str(key), _as_json(item, kind.item_type)) for key, item in value])
    return [_as_json(item, kind.value_type) for item in value]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} appears twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_ANY_DECODER = json.JSONDecoder(parse_int=str)  # of what json takes, numbers of any length included
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_refuse_constant)
