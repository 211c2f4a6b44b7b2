"""Assembles the artifact from finished shards, and reports what is in it."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron.artifacts import Input, Producer, describe_input, write_artifact, write_text
from nemotron.steps.data_prep.sft_packing.blend import HUB
from nemotron.steps.data_prep.sft_packing.corpus import Source
from nemotron.steps.data_prep.sft_packing.job import Job
from nemotron.steps.data_prep.sft_packing.receipts import Receipt
from nemotron.steps.data_prep.sft_packing.rejects import write_rejects
from nemotron.steps.data_prep.sft_packing.splits import SPLITS
from nemotron.steps.data_prep.sft_packing.stages import Packing, finished_shards

# Not beside the shards: pyarrow takes every file in a directory for Parquet.
SIDECARS = "packed_metadata"
_COUNTS = ("rows", "conversations", "documents", "tokens", "supervised_tokens")


def assemble(
    directory: Path,
    job: Job,
    packing: Packing,
    receipts: Sequence[Receipt],
    *,
    produced_by: Producer,
) -> dict[str, Any]:
    """Assemble the artifact in ``directory`` and return its properties, with the report.

    Shards are hard links to the tasks' results where the file system has links, else copies; their
    digests are those in the receipts.

    Args:
        directory: The directory to fill.
        job: The run.
        packing: Its second stage.
        receipts: Receipts of that stage's tasks.
        produced_by: The producer that the manifest names.
    """
    shards = finished_shards(job.workspace.packs, receipts)
    for name, (finished, _) in shards.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(finished, target)
    splits = {
        name: _split_counts([receipt for receipt in receipts if receipt["split"] == name])
        for name in SPLITS
        if any(receipt["split"] == name for receipt in receipts)
    }
    for name, counts in splits.items():
        _write_sidecar(directory / SIDECARS / f"{name}.json", counts, job.settings.pack_size)
    properties = {**job.properties, "splits": splits, "report": _report(job, packing, receipts)}
    samples = [sample for source in job.sources for sample in source.samples]
    write_rejects(directory / "rejects.jsonl", samples)
    # For the adapter: served with another template, it would answer other questions.
    write_text(directory / "chat_template.jinja", job.template)
    write_artifact(
        directory,
        artifact_type="packed_parquet",
        produced_by=produced_by,
        inputs=[_lineage(source.dataset.path) for source in job.sources],
        properties=properties,
        digests={name: digest for name, (_, digest) in shards.items()},
    )
    return properties


def _lineage(path: str) -> Input:
    """Return a data set as an input; one of the hub by its address: the report has its revision."""
    if path.startswith(HUB):
        return Input(type="training_jsonl", path=path)
    return describe_input("training_jsonl", Path(path))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _split_counts(receipts: Sequence[Receipt]) -> dict[str, int]:
    total: Counter[str] = Counter()
    per_row: Counter[int] = Counter()
    for receipt in receipts:
        total.update(receipt["counts"])
        per_row.update({documents: rows for documents, rows in receipt["documents_per_row"]})
    return {name: total[name] for name in _COUNTS} | {
        "documents_per_row_p99": _percentile(per_row, 0.99),
        "documents_per_row_max": max(per_row),
        "longest_document": max(receipt["longest_document"] for receipt in receipts),
        "shortest_row": min(receipt["shortest_row"] for receipt in receipts),
    }


def _percentile(counts: Counter[int], share: float) -> int:
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    return int(values[np.searchsorted(reached, share * reached[-1])])


def _write_sidecar(path: Path, counts: Mapping[str, int], pack_size: int) -> None:
    """Write what Megatron-Bridge reads beside packed data, to pad cu_seqlens for CUDA graphs."""
    tokens = counts["tokens"] - counts["documents"]
    content = {
        "dataset_max_seqlen": counts["longest_document"],
        "max_samples_per_bin": counts["documents_per_row_max"],
        "packing_factor": round(counts["documents"] / counts["rows"], 2),
        "packing_efficiency": round(100 * tokens / (counts["rows"] * pack_size), 2),
        "pack_size": pack_size,
        "min_packed_seqlen": counts["shortest_row"],
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps([content]) + "\n")


def _report(job: Job, packing: Packing, receipts: Sequence[Receipt]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for receipt in receipts:
        total.update(receipt["counts"])
    for source in job.sources:
        dropped.update(source.dropped)
    cut = {name: total[name] for name in ("split", "truncate", "truncate_turn") if total[name]}
    runtime_tokens = total["tokens"] - total["documents"] - total["pad_tokens"]
    return {
        "rows_read": sum(source.rows_read for source in job.sources),
        "kept": int((packing.selection.copies > 0).sum()),
        "dropped": dict(sorted(dropped.items())),
        "truncated": cut,
        "tokens_cut": total["tokens_cut"],
        "tokens": total["tokens"],
        "pad_tokens": total["pad_tokens"],
        "supervised_tokens": total["supervised_tokens"],
        "packing_efficiency": runtime_tokens / (total["rows"] * job.settings.pack_size),
        "documents_per_row": total["documents"] / total["rows"],
        "weight_by": job.blend.weight_by,
        "datasets": [
            _dataset_report(source, number, packing, receipts)
            for number, source in enumerate(job.sources)
        ],
    }


def _dataset_report(
    source: Source, number: int, packing: Packing, receipts: Sequence[Receipt]
) -> dict[str, Any]:
    found: Counter[str] = Counter()
    for receipt in receipts:
        found.update(receipt["datasets"].get(str(number), {}))
    mine = packing.corpus.conversations.datasets == number
    copies = packing.selection.copies[mine]
    return {
        "name": source.dataset.name,
        "files": [
            {"path": str(file.path), "size_bytes": file.size_bytes, "blake3": file.blake3}
            for file in source.files
        ],
        "weight": source.dataset.weight,
        "repeat": source.dataset.repeat,
        "rows_read": source.rows_read,
        "kept": int((copies > 0).sum()),
        "conversations": int(copies.sum()),
        "documents": found["documents"],
        "tokens": found["tokens"],
        "supervised_tokens": found["supervised_tokens"],
        "dropped": dict(sorted(source.dropped.items())),
    }


def format_report(properties: Mapping[str, Any]) -> str:
    """Return the report as a short plain table."""
    report = properties["report"]
    cut = ", ".join(f"{count:,} {how}" for how, count in report["truncated"].items())
    lines = [
        f"rows read    {report['rows_read']:>12,}",
        f"kept         {report['kept']:>12,}",
        *(f"dropped      {count:>12,}  {reason}" for reason, count in report["dropped"].items()),
        f"truncated    {sum(report['truncated'].values()):>12,}  {cut}".rstrip(),
        f"tokens       {report['tokens']:>12,}",
        f"supervised   {report['supervised_tokens']:>12,}"
        f"  {report['supervised_tokens'] / report['tokens']:.1%} of the tokens",
        f"packing      {report['packing_efficiency']:>12.2%}"
        f"  {report['documents_per_row']:.1f} documents per row",
        f"{'split':<8}{'rows':>10}{'documents':>12}{'tokens':>14}{'supervised':>14}",
    ]
    for name, counts in properties["splits"].items():
        lines.append(
            f"{name:<8}{counts['rows']:>10,}{counts['documents']:>12,}"
            f"{counts['tokens']:>14,}{counts['supervised_tokens']:>14,}"
        )
    if len(report["datasets"]) > 1:
        lines += _blend_lines(report)
    return "\n".join(lines)


def _blend_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what each data set came to: its weight, and its share of rows and of tokens."""
    rows = sum(item["conversations"] for item in report["datasets"])
    lines = [f"{'data set':<20}{'weight':>8}{'rows':>12}{'share':>8}{'tokens':>14}{'share':>8}"]
    lines += [
        f"{item['name']:<20}{item['weight']:>8g}{item['conversations']:>12,}"
        f"{item['conversations'] / rows:>8.1%}{item['tokens']:>14,}"
        f"{item['tokens'] / report['tokens']:>8.1%}"
        for item in report["datasets"]
    ]
    return lines
