"""Fetches data sets of the Hugging Face hub, ``hf://owner/name[@revision]``, into its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import HUB, STEP, Dataset

_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def hub_files(dataset: Dataset, *, is_data: Callable[[Path], bool]) -> list[Path]:
    """Return the local files of a data set on the hub; fetched where the cache lacks them.

    ``subset`` and ``split`` choose files by name: those in a directory of that name, and those
    whose own name is or begins with it (``train-00000-of-00002.parquet`` for ``train``).

    Raises:
        NemotronError: ``missing_training_data``.
    """
    from huggingface_hub import snapshot_download

    found = _REPOSITORY.fullmatch(dataset.path.removeprefix(HUB))
    if found is None:
        problem = f"{dataset.path} is not hf://owner/name or hf://owner/name@revision"
        raise step_error(STEP, "missing_training_data", problem, where=dataset.name)
    try:
        root = Path(
            snapshot_download(
                found["name"],
                repo_type="dataset",
                revision=found["revision"],
                allow_patterns=["*.json*", "*.parquet"],
            )
        )
    except (OSError, ValueError) as error:
        problem = f"{dataset.path}: {str(error).strip().splitlines()[0]}"
        raise step_error(STEP, "missing_training_data", problem, where=dataset.name) from None
    paths = [item.relative_to(root) for item in root.rglob("*") if item.is_file() and is_data(item)]
    wanted = [name for name in (dataset.subset, dataset.split) if name is not None]
    chosen = [path for path in paths if all(_is_of(path, name) for name in wanted)]
    if not chosen:
        names = ", ".join(map(str, sorted(paths)[:8])) or "none that this step reads"
        problem = f"{dataset.path} has no file of {' and '.join(wanted) or 'data'}; it has: {names}"
        raise step_error(STEP, "missing_training_data", problem, where=dataset.name)
    return [root / path for path in chosen]


def _is_of(path: Path, name: str) -> bool:
    words: Iterable[str] = (*path.parts[:-1], path.name)
    return any(re.match(re.escape(name) + r"($|[-_.])", word) for word in words)
