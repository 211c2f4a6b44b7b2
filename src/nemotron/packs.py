"""Looks into packed Parquet: statistics of a whole split, and single rows as text.

Reads the output of ``data_prep/sft_packing``, and files with the same columns from elsewhere.
pyarrow, numpy, tokenizers and matplotlib are imported where they are used: the rest of the command
line must not wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron.artifacts import MANIFEST, blake3_file, read_artifact, refuse_unlisted
from nemotron.errors import ExitCode, NemotronError, writing
from nemotron.packed_parquet import (
    COLUMNS,
    check_row,
    file_properties,
    open_file,
    read_group,
    row_groups,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Packs:
    """Packed Parquet files.

    Attributes:
        path: The path that was asked for.
        splits: Files of each split; a single split without a name if there are none.
        properties: Those in ``artifact.json``, or else in the first file's metadata.
    """

    path: Path
    splits: dict[str, list[Path]]
    properties: dict[str, Any]

    @property
    def pack_size(self) -> int | None:
        """Tokens of a row at training time, if that is recorded."""
        return self.properties.get("pack_size")


@dataclass
class SplitStats:
    """Statistics of one split.

    Attributes:
        rows: Packed rows.
        documents: Documents in them.
        tokens: Tokens at training time; the last token of a document is only a label.
        supervised_tokens: Tokens with a loss.
        longest_row: Tokens of the longest row at training time.
        document_lengths: Number of documents by length, tokens at training time.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest_row: int = 0
    document_lengths: dict[int, int] = field(default_factory=dict)

    def quantiles(self) -> dict[str, int]:
        """Return quantiles of the documents' lengths: median, 90 %, 99 % and the longest."""
        found: dict[str, int] = {}
        left = iter(sorted(self.document_lengths.items()))
        length = reached = 0
        for share in QUANTILES:
            while reached < share * self.documents:
                length, count = next(left)
                reached += count
            found["max" if share == 1 else f"p{share * 100:.0f}"] = length
        return found


@dataclass(frozen=True)
class Run:
    """The text of adjacent tokens of a document that are either all trained or all not."""

    text: str
    is_trained: bool


def open_packs(path: Path) -> Packs:
    """Return the packs at a path: an artifact, a directory of Parquet files, or one file.

    Raises:
        NemotronError: ``packs_missing``, ``packs_damaged``, ``artifact_unlisted``, and what
            ``read_artifact`` raises.
    """
    if (path / MANIFEST).is_file():
        artifact = read_artifact(path, "packed_parquet")
        refuse_unlisted(path, artifact, "splits/*/*.parquet")
        splits = {
            name: sorted((path / "splits" / name).glob("*.parquet"))
            for name in ("train", "valid", "test")
        }
        found = {name: files for name, files in splits.items() if files}
        return Packs(path, found, artifact.properties)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise NemotronError(
            "packs_missing",
            f"{path} contains no packed Parquet" if path.exists() else f"{path} does not exist",
            where=str(path),
            fix="pass the output_dir of data_prep/sft_packing, or Parquet files with its columns",
            exit_code=ExitCode.DATA,
        )
    return Packs(path, {"": files}, file_properties(files[0]))


def measure(packs: Packs) -> dict[str, SplitStats]:
    """Return the statistics of every split, computed from its rows, one row group at a time.

    Raises:
        NemotronError: ``packs_damaged``.
    """
    return {name: _measure_split(files) for name, files in packs.splits.items()}


def as_data(packs: Packs, stats: dict[str, SplitStats]) -> dict[str, Any]:
    """Return the statistics as ``nemotron data stats --json`` prints them."""
    size = packs.pack_size or max((item.longest_row for item in stats.values()), default=0)
    report = packs.properties.get("report", {})
    return {
        "path": str(packs.path),
        "pack_size": packs.pack_size,
        "splits": {
            name: {
                "rows": item.rows,
                "documents": item.documents,
                "tokens": item.tokens,
                "supervised_tokens": item.supervised_tokens,
                "supervised_share": item.supervised_tokens / max(item.tokens, 1),
                "efficiency": item.tokens / max(item.rows * size, 1),
                "documents_per_row": item.documents / max(item.rows, 1),
                "document_tokens": item.quantiles(),
            }
            for name, item in stats.items()
        },
        "rows_read": report.get("rows_read"),
        "kept": report.get("kept"),
        "dropped": report.get("dropped", {}),
        "truncated": report.get("truncated", {}),
        "tokens_cut": report.get("tokens_cut"),
        "datasets": [
            {name: entry.get(name) for name in ("name", "weight", "conversations", "tokens")}
            for entry in report.get("datasets", [])
        ],
    }


def draw_histogram(stats: dict[str, SplitStats], file: Path) -> None:
    """Write a PNG with a histogram of the documents' lengths, split by split.

    Raises:
        NemotronError: ``not_png``: the name is that of another format.
    """
    if file.suffix.lower() not in ("", ".png"):
        raise NemotronError(
            "not_png",
            f"{file.name} is written as PNG; its name says {file.suffix}",
            where=str(file),
            fix=f"pass --png {file.with_suffix('.png')}",
        )
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, item in stats.items():
        lengths = list(item.document_lengths)
        counts = list(item.document_lengths.values())
        axes.hist(lengths, bins=60, weights=counts, histtype="step", label=name or "rows")
    axes.set(xlabel="document length in tokens, at training time", ylabel="documents", yscale="log")
    axes.legend()
    with writing(file):
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def read_row(packs: Packs, split: str, number: int) -> dict[str, list[int]]:
    """Return one packed row as its three columns.

    Raises:
        NemotronError: ``split_missing``, ``row_missing``, ``packs_damaged``.
    """
    if split not in packs.splits:
        names = ", ".join(packs.splits)
        raise NemotronError(
            "split_missing", f"no split {split!r}", fix=f"choose one with --split: {names}"
        )
    first = 0
    for path in packs.splits[split]:
        file = open_file(path)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first <= number < first + rows:
                columns = read_group(path, file, group, COLUMNS, first)
                row = {
                    name: column.slice(number - first, 1).to_pylist()[0]
                    for name, column in zip(COLUMNS, columns, strict=True)
                }
                check_row(path, number, row)
                return row
            first += rows
    raise NemotronError(
        "row_missing",
        f"no row {number}; the split has {first} row(s), numbered from 0",
        where=str(packs.path),
        fix=f"pass --row with a number below {first}",
    )


def load_tokenizer(packs: Packs, tokenizer: str | None) -> Tokenizer:
    """Return the packs' tokenizer, from where they name it or from ``tokenizer``, if given.

    Raises:
        NemotronError: ``tokenizer_missing``, ``tokenizer_mismatch``: it did not make these packs.
    """
    from tokenizers import Tokenizer

    name = tokenizer or packs.properties.get("tokenizer")
    path = Path(name or "") / "tokenizer.json"
    if name and not path.is_file() and not Path(name).is_absolute() and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "tokenizer.json")
        path = Path(cached) if isinstance(cached, str) else path
    if not name or not path.is_file():
        raise NemotronError(
            "tokenizer_missing",
            f"no tokenizer.json at {name}" if name else "the packs do not record their tokenizer",
            where=str(packs.path),
            fix="pass --tokenizer DIR, the directory of the model that the data was packed for",
            exit_code=ExitCode.DATA,
        )
    wanted = packs.properties.get("tokenizer_blake3")
    if wanted and blake3_file(path) != wanted:
        raise NemotronError(
            "tokenizer_mismatch",
            f"{path} is not the tokenizer that made these packs",
            where=str(packs.path),
            fix="pass --tokenizer DIR, the directory of the model that the data was packed for",
            exit_code=ExitCode.DATA,
        )
    return Tokenizer.from_file(str(path))


def documents_of(row: dict[str, list[int]], tokenizer: Tokenizer) -> list[list[Run]]:
    """Return the documents of a row as text, cut where training begins and ends.

    The stored mask tells for each token whether the next one is trained; here it is shifted back.
    """
    documents: list[list[Run]] = []
    for start, stop in pairwise([*row["seq_start_id"], len(row["input_ids"])]):
        ids, flags = row["input_ids"][start:stop], [0, *row["loss_mask"][start : stop - 1]]
        runs: list[Run] = []
        begin = 0
        for flag, group in groupby(flags):
            end = begin + len(list(group))
            runs.append(Run(_decoded(tokenizer, ids, begin, end), bool(flag)))
            begin = end
        documents.append(runs)
    return documents


def _decoded(tokenizer: Tokenizer, ids: Sequence[int], begin: int, end: int) -> str:
    """Return the text of some tokens of a document.

    By what they add to those before: some decoders take a blank off the start of what they are
    given. Not where a character is cut in two.
    """
    before, with_them, alone = (
        tokenizer.decode(list(ids[first:last]), skip_special_tokens=False)
        for first, last in ((0, begin), (0, end), (begin, end))
    )
    return with_them.removeprefix(before) if with_them.startswith(before) else alone


def _measure_split(files: Sequence[Path]) -> SplitStats:
    import numpy as np

    stats = SplitStats()
    counts = np.zeros(1, dtype=np.int64)
    for row_starts, documents_of_rows, starts, masks in row_groups(files):
        row_ends = np.append(row_starts[1:], len(masks))
        absolute = starts + np.repeat(row_starts, documents_of_rows)
        lengths = np.diff(np.append(absolute, len(masks))) - 1
        row_tokens = row_ends - row_starts - documents_of_rows
        stats.rows += len(row_starts)
        stats.documents += len(starts)
        stats.tokens += int(lengths.sum())
        stats.supervised_tokens += int(masks.sum())
        stats.longest_row = max(stats.longest_row, int(row_tokens.max(initial=0)))
        found = np.bincount(lengths)
        longest = max(len(counts), len(found))
        counts = np.pad(counts, (0, longest - len(counts)))
        counts[: len(found)] += found
    present = np.flatnonzero(counts)
    stats.document_lengths = dict(zip(present.tolist(), counts[present].tolist(), strict=True))
    return stats
