"""The two stages as lists of tasks: tokenize every part, then pack every shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemotron.artifacts import sha256_json
from nemotron.steps.data_prep.sft_packing.corpus import (
    Corpus,
    Source,
    account,
    load_corpus,
    require_conversations,
    token_groups,
)
from nemotron.steps.data_prep.sft_packing.job import Job
from nemotron.steps.data_prep.sft_packing.pack_task import Group, PackTask
from nemotron.steps.data_prep.sft_packing.receipts import Receipt
from nemotron.steps.data_prep.sft_packing.selection import Selection, blend, take_usable
from nemotron.steps.data_prep.sft_packing.splits import SPLITS
from nemotron.steps.data_prep.sft_packing.tokenizing import TokenizeTask

# Tokens packed together: enough that the last, half-empty row does not matter (1 in 4,000 at a
# pack_size of 4,096), few enough that a worker stays below half a gigabyte.
GROUP_TOKENS = 16 << 20
_BYTES_PER_TOKEN = 5


def tokenize_tasks(job: Job) -> list[TokenizeTask]:
    """Return the first stage's tasks, data set by data set."""
    return [task for source in job.sources for task in source.tasks]


class Packing(NamedTuple):
    """The second stage.

    Attributes:
        tasks: Its tasks, split by split.
        corpus: The output of the first stage.
        selection: The conversations that are taken from it.
    """

    tasks: list[PackTask]
    corpus: Corpus
    selection: Selection


def plan_packing(
    job: Job,
    receipts: Sequence[Receipt],
    *,
    max_bad_fraction: float,
    sample: str | None,
    sample_seed: int,
) -> Packing:
    """Return the second stage, planned from the receipts of the first.

    Args:
        job: The run.
        receipts: Receipts of ``tokenize_tasks(job)``; the counts of the sources come from them.
        max_bad_fraction: Share of a data set's rows that may be unusable, in [0, 1].
        sample: Share of each data set, such as ``10%``; None for all.
        sample_seed: Decides which conversations ``sample`` takes.

    Raises:
        NemotronError: ``bad_rows``, ``rows_not_rendered``, ``bad_loss_masks``,
            ``missing_training_data``, ``seq_length_mismatch``, ``empty_split``,
            ``unreadable_input``.
    """
    of_source: dict[str, list[Receipt]] = {}
    left = iter(receipts)
    for source in job.sources:
        of_source[source.dataset.name] = [next(left) for _ in source.tasks]
        account(source, of_source[source.dataset.name], max_bad_fraction=max_bad_fraction)
    corpus = load_corpus(
        job.sources,
        lambda source: of_source[source.dataset.name],
        directory=job.workspace.tokens,
        policy=job.settings.long_documents,
        max_tokens=job.settings.max_tokens,
    )
    selection = _select(job, corpus, sample=sample, sample_seed=sample_seed)
    return Packing(_pack_tasks(job, corpus, selection), corpus, selection)


def _select(job: Job, corpus: Corpus, *, sample: str | None, sample_seed: int) -> Selection:
    found, datasets = corpus.conversations, [source.dataset for source in job.sources]
    taken = take_usable(found, datasets, sample=sample, sample_seed=sample_seed)
    for number, source in enumerate(job.sources):
        _drop(source, taken, number)
        require_conversations(source, int(taken.copies[found.datasets == number].sum()))
    selection = blend(found, taken, datasets, weight_by=job.blend.weight_by, ratios=job.ratios)
    for number, source in enumerate(job.sources):
        source.dropped.subtract(taken.dropped[number])
        _drop(source, selection, number)
    return selection


def _drop(source: Source, selection: Selection, number: int) -> None:
    source.dropped.update(selection.dropped[number])
    source.dropped += type(source.dropped)()  # forget what is 0


def _pack_tasks(job: Job, corpus: Corpus, selection: Selection) -> list[PackTask]:
    tasks: list[PackTask] = []
    for name in SPLITS:
        ordered = _in_order(corpus, selection, name)
        if len(ordered) == 0:
            continue
        tokens = corpus.conversations.tokens[ordered]
        bounds = token_groups(tokens, max_tokens=GROUP_TOKENS)
        groups = [_group(job, corpus, ordered[start:stop]) for start, stop in bounds]
        sizes = [int(tokens[start:stop].sum()) * _BYTES_PER_TOKEN for start, stop in bounds]
        files = [
            f"shard-{number:05d}-of-{job.shards[name]:05d}.parquet"
            for number in range(job.shards[name])
        ]
        for number, (of_task, held) in enumerate(_spread(files, len(groups))):
            tasks.append(
                PackTask(
                    key=sha256_json([job.pack_key, name, number])[:32],
                    directory=job.workspace.packs,
                    spool_directory=job.workspace.tokens,
                    spools=corpus.spools,
                    split=name,
                    files=tuple(of_task),
                    has_ratio=job.has_ratios,
                    groups=tuple(groups[place] for place in held),
                    size_bytes=sum(sizes[place] for place in held),
                    seed=SPLITS.index(name) << 32 | number,
                    settings=job.settings,
                )
            )
    return tasks


def _in_order(corpus: Corpus, selection: Selection, name: str) -> np.ndarray:
    """Return a split's conversations by hash; the second copies follow after all first ones."""
    mine = selection.of_split(name)
    by_hash = mine[np.argsort(corpus.conversations.uids[mine], kind="stable")]
    copies = selection.copies[by_hash]
    rounds = [by_hash[copies > number] for number in range(int(copies.max(initial=0)))]
    return np.concatenate([mine[:0], *rounds])


def _group(job: Job, corpus: Corpus, chosen: np.ndarray) -> Group:
    found = corpus.conversations
    if job.settings.algorithm == "concatenative":
        chosen = chosen[np.lexsort((found.rows[chosen], found.spools[chosen]))]
    return Group(found.spools[chosen], found.positions[chosen], found.datasets[chosen])


def _spread(files: list[str], num_groups: int) -> list[tuple[list[str], range]]:
    """Return which groups go into which files: one group into several files, or the reverse."""
    num_files = len(files)
    if num_groups <= num_files:
        cuts = [number * num_files // num_groups for number in range(num_groups + 1)]
        return [
            (files[cuts[number] : cuts[number + 1]], range(number, number + 1))
            for number in range(num_groups)
        ]
    cuts = [number * num_groups // num_files for number in range(num_files + 1)]
    return [([file], range(cuts[number], cuts[number + 1])) for number, file in enumerate(files)]


def finished_shards(packs: Path, receipts: Sequence[Receipt]) -> Mapping[str, tuple[Path, str]]:
    """Return the finished shards, each with its BLAKE3, by their names in the output."""
    return {
        f"splits/{receipt['split']}/{name}": (packs / held, receipt["files"][held]["blake3"])
        for receipt in receipts
        for name, held in receipt["names"].items()
    }
