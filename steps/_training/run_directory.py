"""The directory that a run saves to: prepares it, moves an earlier run aside, deletes old saves.

Torch-free, because the launcher asks before it starts anything.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from nemotron.artifacts import read_artifact, write_text
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._training.resume import list_saves, verify_save

METRICS_FILE = "metrics.jsonl"
TRACKER = "latest_checkpointed_iteration.txt"


def room_for(directory: Path, *, load: Path | None) -> Path | None:
    """Return where the earlier run in ``directory`` is moved when a new one starts; None if empty.

    It is kept beside the new run as ``NAME.previous``, so that a rerun does not overwrite what took
    hours to train. Only one is kept. A run that ended before its first save is kept as
    ``NAME.unsaved`` instead: if a job is preempted that early and starts again, the run before it
    is not lost.

    Args:
        directory: Where a run is to start.
        load: Directory of the run that it resumes from, or None.

    Raises:
        NemotronError: ``output_not_ours``: what would be moved or deleted is not a run, or is the
            working directory. ``output_path_overlaps_inputs``: it is what the run resumes from.
    """
    directory = directory.resolve()  # "." has no name; a link stays, and what it leads to is moved
    if directory == Path.cwd():
        raise _is_where_we_are(directory)
    if not _holds_anything(directory):
        return None
    has_saves = any(list_saves(directory))
    previous = directory.with_name(f"{directory.name}.{'previous' if has_saves else 'unsaved'}")
    for place in (directory, previous):
        if _holds_anything(place) and not _is_run(place):
            raise _not_ours(place, directory)
        if load is not None and load.resolve().is_relative_to(place.resolve()):
            raise _loaded_from(place, load)
    return previous


def start_directory(directory: Path, *, load: Path | None) -> Path | None:
    """Make an empty directory for a run; return where the earlier run was moved, see ``room_for``.

    Raises:
        NemotronError: As ``room_for``.
    """
    previous, directory = room_for(directory, load=load), directory.resolve()
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    directory.mkdir(parents=True, exist_ok=True)
    return previous


def resume_directory(directory: Path, iteration: int, damaged: Sequence[Path]) -> None:
    """Prepare a directory for resuming: rename damaged saves, delete leftovers of killed ones.

    A damaged save is kept as ``damaged_iter_NNNNNNN``, since parts of it may still be of use.
    """
    for save in damaged:
        aside = save.with_name(f"damaged_{save.name}")
        shutil.rmtree(aside, ignore_errors=True)
        save.rename(aside)
    write_text(directory / TRACKER, f"{iteration}\n")
    for leftover in directory.glob(".iter_*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def retain_newest(directory: Path, most_recent_k: int, *, until: int) -> None:
    """Delete all saves but the newest ``most_recent_k`` whole ones and the ``best_save``.

    Damaged saves do not count, nor do those after the iteration ``until`` that the run has reached:
    they are from before it went back. The saves that are kept are verified first, so that the last
    whole one is never deleted. The best save is kept because it is the one that is wanted once the
    run has begun to overfit.

    Raises:
        OSError: A save cannot be deleted.
    """
    whole, best = 0, best_save(directory, until=until)
    for iteration, save in list_saves(directory):
        if iteration > until:
            continue
        if whole < most_recent_k:
            with contextlib.suppress(NemotronError, OSError):
                verify_save(save)
                whole += 1
            continue
        if save == best:
            continue
        # Renamed first, so that under its own name a save is whole even while it is being deleted.
        gone = save.with_name(f".{save.name}.deleted")
        save.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        save.with_name(f".{save.name}.lock").unlink(missing_ok=True)


def best_save(directory: Path, *, until: int) -> Path | None:
    """Return the save up to ``until`` with the lowest validation loss; None if none has a loss."""
    losses: dict[Path, float] = {}
    for iteration, save in list_saves(directory):
        with contextlib.suppress(NemotronError, OSError):
            loss = read_artifact(save, "checkpoint_lora").properties.get("valid_loss")
            if loss is not None and iteration <= until:
                losses[save] = loss
    return min(losses, key=losses.__getitem__, default=None)


def _holds_anything(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _is_run(directory: Path) -> bool:
    """Return whether a run has been there: it writes its metrics first, and then only saves."""
    if (directory / METRICS_FILE).is_file() or any(directory.glob(".iter_*")):
        return True
    return any((save / "adapter_config.json").is_file() for _, save in list_saves(directory))


def _not_ours(place: Path, directory: Path) -> NemotronError:
    return NemotronError(
        "output_not_ours",
        f"{place} has files that no run wrote; a run in {directory} would move or delete them",
        where="checkpoint.save",
        fix="pass another checkpoint.save, or move the files away yourself",
        exit_code=ExitCode.IO,
    )


def _is_where_we_are(directory: Path) -> NemotronError:
    return NemotronError(
        "output_not_ours",
        f"{directory} is the working directory, which the next run there would have to move",
        where="checkpoint.save",
        fix="pass a directory for the run alone, such as checkpoint.save=output/mine",
        exit_code=ExitCode.IO,
    )


def _loaded_from(place: Path, load: Path) -> NemotronError:
    return NemotronError(
        "output_path_overlaps_inputs",
        f"checkpoint.load={load} is in {place}, which the new run would move or delete",
        where="checkpoint.load",
        fix="pass another checkpoint.save, or rename that run's directory first",
    )
