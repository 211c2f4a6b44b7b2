"""Documents to a finished artifact: split, pack, write, and say what came out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron.artifacts import Producer, describe_input, sha256_file, write_artifact, write_text
from nemotron.steps.data_prep.sft_packing.corpus import Source, all_documents
from nemotron.steps.data_prep.sft_packing.documents import Documents
from nemotron.steps.data_prep.sft_packing.inputs import list_files
from nemotron.steps.data_prep.sft_packing.masks import Encoder
from nemotron.steps.data_prep.sft_packing.packing import Rows, pack
from nemotron.steps.data_prep.sft_packing.parquet import write_shards
from nemotron.steps.data_prep.sft_packing.rejects import write_rejects
from nemotron.steps.data_prep.sft_packing.splits import split_documents


def write_packed(
    directory: Path,
    sources: Sequence[Source],
    *,
    encoder: Encoder,
    produced_by: Producer,
    ratios: Mapping[str, float],
    shards: Mapping[str, int],
    pack_size: int,
    algorithm: str,
    seed: int,
    row_group_size: int,
    compression: str,
) -> dict[str, Any]:
    """Write the packed_parquet artifact and return its properties, ``report`` among them.

    Args:
        directory: Directory of the artifact.
        sources: Documents of every data set.
        encoder: What encoded them.
        produced_by: What the manifest names as producer.
        ratios: Share of the documents in each split.
        shards: Files of each split.
        pack_size: Tokens of a row at training time.
        algorithm: See ``packing.pack``.
        seed: Seed of packing.
        row_group_size: Rows of a Parquet row group.
        compression: Codec name of pyarrow.

    Raises:
        NemotronError: ``empty_split``, ``too_many_tiny_shards``.
    """
    properties: dict[str, Any] = {
        "pack_size": pack_size,
        "tokenizer_sha256": encoder.tokenizer.sha256,
        "chat_template_sha256": hashlib.sha256(encoder.template.text.encode()).hexdigest(),
        "vocab_size": encoder.tokenizer.vocab_size,
        "eos_token_id": encoder.tokenizer.eos_token_id,
        "pad_token_id": encoder.tokenizer.pad_token_id,
        "algorithm": algorithm,
        "seed": seed,
    }
    metadata = {name: str(value) for name, value in properties.items()}
    documents = all_documents(sources)
    splits: dict[str, dict[str, int]] = {}
    for name, chosen in split_documents(documents.uids, ratios).items():
        part = documents.take(chosen)
        rows = pack(part.runtime_lengths, capacity=pack_size, algorithm=algorithm, seed=seed)
        write_shards(
            directory / "splits" / name,
            part,
            rows,
            num_shards=shards[name],
            row_group_size=row_group_size,
            compression=compression,
            metadata=metadata | {"split": name},
        )
        splits[name] = _counts(part, rows)
    properties |= {"splits": splits, "report": _report(sources, splits, pack_size)}
    samples = [sample for source in sources for sample in source.rejects.samples]
    write_rejects(directory / "rejects.jsonl", samples)
    # Goes on with the adapter: served with another template, it would answer other questions.
    write_text(directory / "chat_template.jinja", encoder.template.text)
    write_artifact(
        directory,
        artifact_type="packed_parquet",
        produced_by=produced_by,
        inputs=[describe_input("training_jsonl", Path(item.dataset.path)) for item in sources],
        properties=properties,
    )
    return properties


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
        f"  {report['documents_per_row']:.1f} documents a row",
        f"{'split':<8}{'rows':>10}{'documents':>12}{'tokens':>14}{'supervised':>14}",
    ]
    for name, counts in properties["splits"].items():
        lines.append(
            f"{name:<8}{counts['rows']:>10,}{counts['documents']:>12,}"
            f"{counts['tokens']:>14,}{counts['supervised_tokens']:>14,}"
        )
    return "\n".join(lines)


def _counts(documents: Documents, rows: Rows) -> dict[str, int]:
    return {
        "rows": rows.num_rows,
        "documents": len(documents),
        "tokens": len(documents.ids),
        "supervised_tokens": int(documents.supervised_tokens.sum()),
    }


def _report(
    sources: Sequence[Source], splits: Mapping[str, Mapping[str, int]], pack_size: int
) -> dict[str, Any]:
    total: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for counts in splits.values():
        total.update(counts)
    for source in sources:
        dropped.update(source.rejects.counts)
        truncated.update(source.documents.truncation_counts)
    runtime_tokens = total["tokens"] - total["documents"]
    return {
        "rows_read": sum(source.rows_read for source in sources),
        "kept": total["documents"],
        "dropped": dict(sorted(dropped.items())),
        "truncated": dict(sorted(truncated.items())),
        "tokens": total["tokens"],
        "supervised_tokens": total["supervised_tokens"],
        "packing_efficiency": runtime_tokens / (total["rows"] * pack_size),
        "documents_per_row": total["documents"] / total["rows"],
        "datasets": [_dataset_report(source) for source in sources],
    }


def _dataset_report(source: Source) -> dict[str, Any]:
    return {
        "name": source.dataset.name,
        "files": [
            {"path": str(file), "size_bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for file in list_files(source.dataset)
        ],
        "weight": source.dataset.weight,
        "rows_read": source.rows_read,
        "documents": len(source.documents),
        "tokens": len(source.documents.ids),
        "supervised_tokens": int(source.documents.supervised_tokens.sum()),
        "dropped": dict(sorted(source.rejects.counts.items())),
    }
