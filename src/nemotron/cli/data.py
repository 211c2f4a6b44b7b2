"""``nemotron data stats | inspect``: what is in packed data."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nemotron import packs
from nemotron.cli.options import Debug, Json

app = typer.Typer(
    help="Inspect packed data.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Packed = Annotated[
    Path, typer.Argument(metavar="PATH", help="Output of data_prep/sft_packing, or packed Parquet.")
]

_GREEN, _DIM, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@app.command("stats")
def show_stats(
    path: Packed,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write a histogram of lengths to this file.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show lengths, efficiency, supervised share, drops and the blend."""
    found = packs.open_packs(path)
    stats = packs.measure(found)
    if png is not None:
        packs.draw_histogram(stats, png)
    data = packs.as_data(found, stats)
    print(json.dumps(data, indent=2) if as_json else stats_page(data))


@app.command("inspect")
def show_row(
    path: Packed,
    row: Annotated[int, typer.Option("--row", min=0, help="Row number, from 0.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "train",
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Tokenizer directory, if it has moved.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a row as text, with trained tokens in colour, or in <<...>> without colours."""
    found = packs.open_packs(path)
    name = "" if "" in found.splits else split
    columns = packs.read_row(found, name, row)
    documents = packs.documents_of(columns, packs.load_tokenizer(found, tokenizer))
    if as_json:
        data = [
            [{"text": run.text, "trained": run.is_trained} for run in item] for item in documents
        ]
        print(json.dumps({"row": row, "split": split, "documents": data}, indent=2))
    else:
        has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(row_page(columns, documents, has_colours=has_colours))


def stats_page(data: Mapping[str, Any]) -> str:
    """Return the numbers of packs as a page of text."""
    lines = [
        f"{'split':<8}{'rows':>10}{'documents':>12}{'tokens':>14}{'supervised':>12}{'full':>8}"
        f"{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}"
    ]
    for name, item in data["splits"].items():
        lengths = "".join(f"{length:>8,}" for length in item["document_tokens"].values())
        lines.append(
            f"{name or '-':<8}{item['rows']:>10,}{item['documents']:>12,}{item['tokens']:>14,}"
            f"{item['supervised_share']:>12.1%}{item['efficiency']:>8.2%}{lengths}"
        )
    if data["rows_read"] is not None:
        lines.append(f"\nrows read {data['rows_read']:,}, kept {data['kept']:,}")
    lines += [f"dropped   {count:,} {reason}" for reason, count in data["dropped"].items()]
    lines += [f"truncated {count:,} {how}" for how, count in data["truncated"].items()]
    if data["tokens_cut"]:
        lines.append(f"tokens cut {data['tokens_cut']:,}")
    if len(data["datasets"]) > 1:
        lines += _blend_lines(data["datasets"])
    return "\n".join(lines)


def _blend_lines(datasets: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = sum(item["conversations"] for item in datasets)
    tokens = sum(item["tokens"] for item in datasets)
    lines = [f"\n{'data set':<24}{'weight':>8}{'rows':>12}{'share':>8}{'tokens':>14}{'share':>8}"]
    lines += [
        f"{item['name']:<24}{item['weight']:>8g}{item['conversations']:>12,}"
        f"{item['conversations'] / rows:>8.1%}{item['tokens']:>14,}{item['tokens'] / tokens:>8.1%}"
        for item in datasets
    ]
    return lines


def row_page(
    columns: Mapping[str, Sequence[int]],
    documents: Sequence[Sequence[packs.Run]],
    *,
    has_colours: bool,
) -> str:
    """Return a packed row as text, a line between its documents."""
    bounds = [*columns["seq_start_id"], len(columns["input_ids"])]
    lines: list[str] = []
    for number, runs in enumerate(documents):
        start, stop = bounds[number], bounds[number + 1]
        trained = sum(columns["loss_mask"][start:stop])
        title = f"--- document {number}: {stop - start:,} tokens, {trained:,} of them trained"
        lines.append(f"{_DIM}{title}{_RESET}" if has_colours else title)
        lines.append("".join(_marked(run, has_colours=has_colours) for run in runs))
    return "\n".join(lines)


def _marked(run: packs.Run, *, has_colours: bool) -> str:
    text = "".join(
        char if char.isprintable() or char in "\n\t" else _escaped(char) for char in run.text
    )
    if not run.is_trained:
        return text
    return f"{_GREEN}{text}{_RESET}" if has_colours else f"<<{text}>>"


def _escaped(char: str) -> str:
    """Escape a control character: data must not move the reader's cursor."""
    return char.encode("unicode_escape").decode()
