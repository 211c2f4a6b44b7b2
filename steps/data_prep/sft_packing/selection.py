"""Selects conversations by hash, before packing: which are taken, how often, and into which split.

The selection depends on what the conversations say and on the config, but not on the order of
files, on how they were cut into tasks, or on the number of workers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP, Dataset, WeightBy
from nemotron.steps.data_prep.sft_packing.splits import SPLITS, split_documents


@dataclass(frozen=True)
class Conversations:
    """The conversations of all data sets, in the order of the blend: 37 bytes each.

    Attributes:
        uids: Content hash, uint64.
        datasets: Index of the data set, int32, ascending.
        spools: Index of the spool, int32, ascending.
        positions: Index within the spool, uint32.
        rows: Row within the part of the file, uint32.
        tokens: Upper bound of its tokens at training time after cutting, int64.
        survives: Whether the policy for long documents keeps any part of it.
    """

    uids: np.ndarray
    datasets: np.ndarray
    spools: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    survives: np.ndarray


@dataclass(frozen=True)
class Selection:
    """The conversations that are taken.

    Attributes:
        splits: Index of each conversation's split in ``SPLITS``, int8; -1 if it is not taken.
        copies: How often its split holds it, int64; 0 if it is not taken.
        dropped: Conversations that are not taken, by reason, for each data set.
    """

    splits: np.ndarray
    copies: np.ndarray
    dropped: tuple[Counter[str], ...]

    def of_split(self, name: str) -> np.ndarray:
        """Return the indices of a split's conversations, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(name))


def take_usable(
    found: Conversations,
    datasets: Sequence[Dataset],
    *,
    sample: str | None,
    sample_seed: int,
) -> Selection:
    """Return what is left after ``max_rows``, the policy for long documents, and ``sample``."""
    copies = np.ones(len(found.uids), dtype=np.int64)
    dropped = tuple(Counter[str]() for _ in datasets)

    def keep(number: int, chosen: np.ndarray, reason: str) -> None:
        mine = np.flatnonzero((found.datasets == number) & (copies > 0))
        left_out = np.setdiff1d(mine, mine[chosen], assume_unique=True)
        copies[left_out] = 0
        if len(left_out):
            dropped[number][reason] += len(left_out)

    for number, dataset in enumerate(datasets):
        mine = np.flatnonzero(found.datasets == number)
        if dataset.max_rows is not None:
            keep(number, smallest_hashes(found.uids[mine], dataset.max_rows), "max_rows")
        mine = mine[copies[mine] > 0]
        keep(number, np.flatnonzero(found.survives[mine]), "over_long")
        mine = mine[copies[mine] > 0]
        if sample is not None:
            count = round(len(mine) * float(sample.rstrip("%")) / 100)
            keep(number, smallest_hashes(found.uids[mine], count, seed=sample_seed), "sample")
    return Selection(np.full(len(copies), -1, dtype=np.int8), copies, dropped)


def blend(
    found: Conversations,
    taken: Selection,
    datasets: Sequence[Dataset],
    *,
    weight_by: WeightBy,
    ratios: Mapping[str, float],
) -> Selection:
    """Return the final selection, with weights and repeats applied and a split for each.

    Only the train split repeats conversations; in another split, a copy would count twice in means.

    Raises:
        NemotronError: ``empty_split``.
    """
    copies, dropped = taken.copies.copy(), tuple(Counter(counts) for counts in taken.dropped)
    for into in sorted({dataset.into or "" for dataset in datasets}):
        group = [n for n, dataset in enumerate(datasets) if (dataset.into or "") == into]
        members = [np.flatnonzero((found.datasets == n) & (copies > 0)) for n in group]
        _weigh(found, members, [datasets[n] for n in group], copies, weight_by)
        for number, mine in zip(group, members, strict=True):
            if count := int((copies[mine] == 0).sum()):
                dropped[number]["weight"] += count
    splits = np.full(len(copies), -1, dtype=np.int8)
    if any(dataset.into for dataset in datasets):
        _assign(found, datasets, splits, copies, dropped)
    else:
        indices = np.flatnonzero(copies)
        for name, chosen in split_documents(found.uids[indices], ratios).items():
            splits[indices[chosen]] = SPLITS.index(name)
    copies[splits > 0] = 1
    return Selection(splits, copies, dropped)


def smallest_hashes(uids: np.ndarray, count: int, *, seed: int | None = None) -> np.ndarray:
    """Return the indices of the ``count`` conversations with the smallest hashes, ascending.

    The choice depends only on what they say, and a larger count chooses a superset of a smaller
    one. With a seed, the hashes are hashed once more together with it.
    """
    keys = uids
    if seed is not None:
        keys = np.array([_rehash(uid, seed) for uid in uids.tolist()], dtype=np.uint64)
    return np.sort(np.argsort(keys, kind="stable")[:count])


def blend_targets(available: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return how much of each data set a blend takes, in rows or in tokens.

    Equal weights keep everything. Otherwise weights are relative amounts: the data set that is
    scarcest for its weight is taken whole and the others in proportion.

    Args:
        available: Rows or tokens of each data set, repeats included, each above 0.
        weights: Positive weight of each data set.
    """
    if len(set(weights)) == 1:
        return list(available)
    scale = min(count / weight for count, weight in zip(available, weights, strict=True))
    return [weight * scale for weight in weights]


def _weigh(
    found: Conversations,
    members: Sequence[np.ndarray],
    datasets: Sequence[Dataset],
    copies: np.ndarray,
    weight_by: WeightBy,
) -> None:
    """Set ``copies`` so that the data sets stand in the proportion of their weights."""
    amounts = [
        found.tokens[mine] if weight_by == "tokens" else np.ones(len(mine), np.int64)
        for mine in members
    ]
    totals = [int(amount.sum()) for amount in amounts]
    available = [total * item.repeat for total, item in zip(totals, datasets, strict=True)]
    targets = blend_targets(available, [dataset.weight for dataset in datasets])
    for mine, amount, total, target in zip(members, amounts, totals, targets, strict=True):
        whole = int(target / total + 1e-9)
        by_hash = mine[np.argsort(found.uids[mine], kind="stable")]
        reached = np.cumsum(amount[np.argsort(found.uids[mine], kind="stable")])
        # To the nearest: half of the next one counts as reached.
        count = int(np.searchsorted(reached, target - whole * total + 1e-6, side="right"))
        if count < len(reached):
            before = reached[count - 1] if count else 0
            count += 2 * (target - whole * total - before) >= reached[count] - before + 1e-6
        copies[mine] = whole
        copies[by_hash[: count if whole else max(count, 1)]] += 1


def _assign(
    found: Conversations,
    datasets: Sequence[Dataset],
    splits: np.ndarray,
    copies: np.ndarray,
    dropped: Sequence[Counter[str]],
) -> None:
    """Give conversations the split of their data set; what two splits have is held out.

    Raises:
        NemotronError: ``empty_split``.
    """
    of_dataset = np.array([SPLITS.index(dataset.into or "train") for dataset in datasets])
    splits[:] = np.where(copies > 0, of_dataset[found.datasets], -1)
    held_out = np.empty(0, dtype=np.uint64)
    for number in range(len(SPLITS) - 1, -1, -1):
        mine = np.flatnonzero(splits == number)
        double = mine[np.isin(found.uids[mine], held_out)]
        splits[double], copies[double] = -1, 0
        for dataset, count in Counter(found.datasets[double].tolist()).items():
            dropped[dataset]["in_other_split"] += count
        held_out = np.union1d(held_out, found.uids[mine])
        if len(mine) and len(double) == len(mine):
            others = " or ".join(SPLITS[number + 1 :])
            problem = (
                f"{SPLITS[number]} would be empty: {others} has all its {len(mine)} conversations"
            )
            raise step_error(STEP, "empty_split", problem, where=SPLITS[number])


def _rehash(uid: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
