"""The report as one self-contained HTML file: style and charts are inline, and there is no script.

It is also well-formed XML, and its content security policy keeps a browser from loading anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from nemotron.report.chart import Line, line_chart, number
from nemotron.report.markup import escape
from nemotron.report.run import TrainingRun, config_difference, summary

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --paper: #ffffff; --faint: #d8dce3;
  --run0: #1f6fb4; --run1: #d1640a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3ea; --paper: #14171c; --faint: #343a45; --run0: #6cb2ee; --run1: #f2a35e; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1360px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
.charts { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
svg { width: 100%; height: auto; } figure { margin: 0; } figcaption { font-weight: 600; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { text-align: left; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--faint);
  vertical-align: top; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.grid { stroke: var(--faint); stroke-width: 1; } .axis { fill: var(--ink); font-size: 11px; }
polyline { fill: none; stroke-width: 1.6; } polyline.marked { stroke-dasharray: 5 3; }
polyline.run0 { stroke: var(--run0); } polyline.run1 { stroke: var(--run1); }
.dot.run0 { fill: var(--run0); } .dot.run1 { fill: var(--run1); } .spot { fill: transparent; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .3em; }
.key.run0 { background: var(--run0); } .key.run1 { background: var(--run1); }
"""

_GIB = 2**30
# Title, field of a step, and what its values are divided by.
_CHARTS = (
    ("Gradient norm", "grad_norm", 1.0),
    ("Learning rate", "learning_rate", 1.0),
    ("Tokens per second", "tokens_per_second", 1.0),
    ("Supervised tokens per second", "supervised_tokens_per_second", 1.0),
    ("TFLOP/s per rank", "tflops_per_rank", 1.0),
    ("Peak memory per rank, GiB", "peak_memory_bytes", float(_GIB)),
)
_FIGURES = {
    "status": "status of the last job",
    "iterations": "iterations",
    "train_iters": "planned iterations",
    "best_valid_loss": "best validation loss",
    "best_iteration": "iteration of the best validation loss",
    "first_valid_loss": "first validation loss",
    "last_valid_loss": "last validation loss",
    "first_loss": "first training loss",
    "last_loss": "last training loss",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "step_seconds": "seconds spent in steps",
    "tokens_per_second": "tokens per second",
    "supervised_tokens_per_second": "supervised tokens per second",
    "tflops_per_rank": "TFLOP/s per rank",
    "peak_memory_bytes": "peak memory per rank, bytes",
    "directory": "directory",
}


def report_page(run: TrainingRun, against: TrainingRun | None = None) -> str:
    """Return the page of a run, or of two runs with their curves in the same charts."""
    runs = [run] if against is None else [run, against]
    title = " against ".join(each.name for each in runs)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\"/>",
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _figures(runs),
        '<div class="charts">',
        *_charts(runs),
        "</div>",
    ]
    if against is not None:
        parts += ["<h2>Config differences</h2>", _difference(run, against)]
    for index, each in enumerate(runs):
        named = f"{_key(index)}{escape(each.name)}"
        parts += [f"<h2>{named}: events</h2>", _timeline(each)]
        parts += [f"<h2>{named}: saves</h2>", _saves(each)]
        parts += [f"<h2>{named}: config</h2>", _config(each)]
    return "\n".join([*parts, "</body></html>\n"])


def _figures(runs: Sequence[TrainingRun]) -> str:
    figures = [summary(each) for each in runs]
    names = [f"{_key(index)}{escape(each.name)}" for index, each in enumerate(runs)]
    rows = [
        [escape(label), *(_cell(each[field]) for each in figures)]
        for field, label in _FIGURES.items()
    ]
    return _table(["", *names], rows)


def _charts(runs: Sequence[TrainingRun]) -> list[str]:
    losses = [
        line
        for index, each in enumerate(runs)
        for line in (
            Line(f"{each.name} training", each.series("lm_loss"), index),
            Line(f"{each.name} validation", each.validations, index, is_marked=True),
        )
    ]
    charts = [_figure("Loss (training solid, validation dashed)", losses)]
    for title, field, scale in _CHARTS:
        lines = [
            Line(each.name, [(x, y / scale) for x, y in each.series(field)], index)
            for index, each in enumerate(runs)
        ]
        charts.append(_figure(title, lines))
    return charts


def _figure(title: str, lines: Sequence[Line]) -> str:
    chart = line_chart(lines, x_label="iteration")
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _difference(run: TrainingRun, against: TrainingRun) -> str:
    rows = [
        [escape(key), *(escape(_plain(value)) for value in pair)]
        for key, pair in config_difference(run, against).items()
    ]
    names = [f"{_key(index)}{escape(each.name)}" for index, each in enumerate((run, against))]
    return _table(["key", *names], rows) if rows else "<p>None.</p>"


def _timeline(run: TrainingRun) -> str:
    rows = [
        [
            datetime.fromtimestamp(each.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "" if each.iteration is None else str(each.iteration),
            escape(each.text),
        ]
        for each in run.timeline
    ]
    return _table(["time", "iteration", "event"], rows)


def _saves(run: TrainingRun) -> str:
    best = run.best[0] if run.best else None
    losses = dict(run.validations)
    rows = [
        [
            str(iteration),
            _cell(losses.get(iteration)) + (" (best)" if iteration == best else ""),
            escape(directory),
        ]
        for iteration, directory in run.saves
    ]
    return _table(["iteration", "validation loss", "directory"], rows)


def _config(run: TrainingRun) -> str:
    rows = [[escape(k), escape(_plain(v))] for k, v in run.config.items() if v is not None]
    return (
        f"<details><summary>{len(rows)} values</summary>{_table(['key', 'value'], rows)}</details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table>\n{body}</table></div>'


def _key(index: int) -> str:
    return f'<span class="key run{index}"></span>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return escape(f"{value:,}" if isinstance(value, int) else _plain(value))


def _plain(value: Any) -> str:
    return "" if value is None else str(value)
