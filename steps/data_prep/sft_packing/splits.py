"""Splits documents into train, valid and test: by content hash, exactly, before packing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP

SPLITS = ("train", "valid", "test")


def split_counts(num_documents: int, ratios: Mapping[str, float]) -> dict[str, int]:
    """Return the documents of each split with a ratio above 0, by largest remainder.

    A count differs from its exact share by less than one document, except that no split is rounded
    down to nothing: it takes one from the largest split instead.
    """
    exact = {name: num_documents * ratio for name, ratio in ratios.items() if ratio > 0}
    counts = {name: int(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num_documents - sum(counts.values())]:
        counts[name] += 1
    for name in [name for name, count in counts.items() if count == 0]:
        largest = max(counts, key=lambda other: counts[other])
        if counts[largest] > 1:
            counts[name] += 1
            counts[largest] -= 1
    return counts


def split_documents(uids: np.ndarray, ratios: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Return the indices of the documents of each split, ascending.

    The smaller splits are filled first, in the order of the hashes, so that a document's split does
    not depend on the seed, the number of shards or the order of the files. Documents with the same
    hash say the same and stay together: a group that does not fit into a split is passed over, and
    ends up in the largest one.

    Raises:
        NemotronError: ``empty_split``.
    """
    counts = split_counts(len(uids), ratios)
    order = np.argsort(uids, kind="stable")
    _, starts, sizes = np.unique(uids[order], return_index=True, return_counts=True)
    names = sorted(counts, key=lambda name: counts[name])
    group_split = np.full(len(starts), len(names) - 1)
    for number, name in enumerate(names[:-1]):
        room = counts[name]
        for group in np.flatnonzero(group_split == len(names) - 1).tolist():
            if room == 0:
                break
            if sizes[group] <= room:
                group_split[group] = number
                room -= sizes[group]
    split_of = np.repeat(group_split, sizes)
    chosen = {name: np.sort(order[split_of == number]) for number, name in enumerate(names)}
    for name, indices in chosen.items():
        if len(indices) == 0:
            problem = (
                f"{name} would be empty: {len(uids)} documents, {len(starts)} of them distinct, "
                f"at a ratio of {ratios[name]:g}"
            )
            raise step_error(STEP, "empty_split", problem, where=f"{name}_ratio")
    return {name: chosen[name] for name in ratios if name in chosen}
