"""Files to rows: JSONL line by line, JSON lists item by item, each with its place in the file."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.artifacts import MANIFEST
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP, Dataset
from nemotron.steps.data_prep.sft_packing.rejects import BadRowError

SUFFIXES = (".jsonl", ".json")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        file: The file.
        place: ``line`` (JSONL, from 1) or ``item`` (JSON list, from 0).
        position: Number of the line or item.
        value: The parsed JSON, or why it does not parse.
    """

    file: Path
    place: str
    position: int
    value: Any | BadRowError


def list_files(dataset: Dataset) -> list[Path]:
    """Return the files of a data set in the order of their names.

    A directory gives the ``.jsonl`` and ``.json`` files directly in it, without hidden files.

    Raises:
        NemotronError: ``missing_training_data``.
    """
    path = Path(dataset.path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = [item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file()]
        files = [item for item in files if item.name != MANIFEST and not item.name.startswith(".")]
    else:
        files = [Path(name) for name in glob.glob(dataset.path, recursive=True)]  # noqa: PTH207
        files = [item for item in files if item.is_file()]
    if not files:
        what = "holds no .jsonl or .json file" if path.is_dir() else "does not exist"
        raise step_error(STEP, "missing_training_data", f"{path} {what}", where=dataset.name)
    for item in files:
        if item.suffix not in SUFFIXES:
            problem = f"{item} is neither .jsonl nor .json"
            raise step_error(STEP, "missing_training_data", problem, where=dataset.name)
    return sorted(files)


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of one file; blank lines are no rows.

    Raises:
        NemotronError: ``bad_rows``: a JSON list that does not parse; none of it can be read.
    """
    if file.suffix == ".json" and _starts_with_list(file):
        for index, value in enumerate(_read_list(file)):
            yield Row(file, "item", index, value)
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not text.isspace() and text:
                yield Row(file, "line", number, _parse(text))


def _parse(line: bytes) -> Any | BadRowError:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError("invalid_unicode", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRowError("malformed_json", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRowError("malformed_json", str(error))


def _starts_with_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["


def _read_list(file: Path) -> list[Any]:
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        problem, where = error.msg, f"{file}:{error.lineno}"
    except (ValueError, RecursionError) as error:
        problem, where = str(error), str(file)
    raise step_error(STEP, "bad_rows", f"not a JSON list: {problem}", where=where)
