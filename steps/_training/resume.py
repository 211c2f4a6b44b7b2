"""Where a run starts: afresh, or from the newest save that is whole and belongs to the same run.

Torch-free, because the launcher asks before it starts anything. A run resumes only from a save
that it would have written itself: every save stores what its result depends on, its ``identity``
(dotted config keys and digests of the inputs), and that must equal the run's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemotron.artifacts import read_artifact, verify_files
from nemotron.errors import NemotronError
from nemotron.steps._training.validation import Best, Validation

STATE_FILE = "trainer_state.json"
_SAVE = re.compile(r"iter_(\d{7,})")


class ResumeMismatchError(ValueError):
    """A save belongs to a run with other values; the message lists the keys with both."""


class NoSaveToLoadError(ValueError):
    """There is no save to resume from where the config says that there is one."""


@dataclass(frozen=True)
class SavedRun:
    """A whole save and what it says of its run.

    Attributes:
        directory: The ``iter_NNNNNNN`` directory.
        iteration: Optimizer steps taken.
        train_iters: Optimizer steps that its run was to take.
        identity: What its result depends on.
        before: Evaluation before the first step.
        is_evaluated: Whether the evaluation that was due at this iteration was finished.
        best: The best evaluation so far.
    """

    directory: Path
    iteration: int
    train_iters: int
    identity: dict[str, Any]
    before: Validation | None
    is_evaluated: bool
    best: Best | None

    @property
    def is_finished(self) -> bool:
        """Whether its run came to its end, the last evaluation included."""
        return self.iteration >= self.train_iters and self.is_evaluated


@dataclass(frozen=True)
class _FoundSave:
    """The newest whole save in a directory, and the saves that were passed over to find it.

    Attributes:
        saved: The save; None if no save in the directory is whole.
        damaged: Newer saves that cannot be used.
        notes: A line for each save that was passed over.
    """

    saved: SavedRun | None
    damaged: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """The decision how a run starts.

    Attributes:
        saved: The save to resume from; None to start afresh.
        is_in_place: Whether the run continues in the directory that it saves to.
        damaged: Saves in that directory that must be set aside first.
        notes: Lines to print.
    """

    saved: SavedRun | None = None
    is_in_place: bool = False
    damaged: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def choose_start(
    output: Path,
    *,
    load: Path | None,
    ckpt_step: int | None,
    train_iters: int,
    identity: Mapping[str, Any],
    digests: bool = True,
) -> Start:
    """Decide where a run that saves to ``output`` starts.

    An unfinished run in ``output`` comes first, so that a requeued job continues where it was
    stopped; ``load`` comes second. A finished run in ``output`` is continued only if
    ``train_iters`` was raised and nothing else has changed.

    Args:
        output: Directory that the run saves to.
        load: Directory of another run to resume from, or None.
        ckpt_step: The iteration of ``load`` to resume from; None for its newest whole save.
        train_iters: Optimizer steps of the run.
        identity: What the run's result depends on.
        digests: Whether the files of a save must have their recorded digests for it to be whole.

    Raises:
        ResumeMismatchError: The save to resume from belongs to a run with other values.
        NoSaveToLoadError: ``load`` has no whole save, or none of ``ckpt_step``.
    """
    own = _newest_whole_save(output, digests=digests)
    notes = own.notes
    if own.saved is not None:
        changes = differences(own.saved.identity, identity)
        in_place = Start(own.saved, is_in_place=True, damaged=own.damaged, notes=notes)
        if not own.saved.is_finished:
            changes += _nothing_to_do(own.saved, train_iters)
            if changes:
                raise _mismatch(own.saved, f"{output} holds an unfinished run", changes)
            return in_place
        if train_iters > own.saved.iteration:
            if not changes:
                return in_place
            reason = "; ".join(changes)
            notes += (f"the finished run in {output} is not continued, because of {reason}",)
    if load is None:
        return Start(notes=notes)
    start = _start_from(load, ckpt_step, train_iters, identity, digests)
    return replace(start, notes=(*notes, *start.notes))


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what differs, one ``key: saved -> wanted`` each."""
    absent = "(none)"
    pairs = {
        key: (saved.get(key, absent), wanted.get(key, absent)) for key in sorted({*saved, *wanted})
    }
    return [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def list_saves(directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield (iteration, directory) of every save, whole or not, newest first."""
    if not directory.is_dir():
        return
    matches = ((_SAVE.fullmatch(path.name), path) for path in directory.iterdir())
    yield from sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def save_name(iteration: int) -> str:
    """Return the name of an iteration's save."""
    return f"iter_{iteration:07d}"


def run_state(
    *,
    train_iters: int,
    identity: Mapping[str, Any],
    before: Validation | None,
    is_evaluated: bool,
    best: Best | None,
) -> dict[str, Any]:
    """Return the content of a ``trainer_state.json``; the fields are those of ``SavedRun``."""
    return {
        "format_version": 1,
        "train_iters": train_iters,
        "identity": dict(identity),
        "before": asdict(before) if before else None,
        "is_evaluated": is_evaluated,
        "best": asdict(best) if best else None,
    }


def read_saved(directory: Path) -> SavedRun:
    """Return what a save says of its run.

    Raises:
        OSError, ValueError, KeyError, TypeError: It has no ``trainer_state.json`` that parses.
    """
    values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    before, best = values["before"], values["best"]
    return SavedRun(
        directory=directory,
        iteration=int(directory.name.removeprefix("iter_")),
        train_iters=int(values["train_iters"]),
        identity=dict(values["identity"]),
        before=Validation(**before) if before else None,
        is_evaluated=bool(values["is_evaluated"]),
        best=Best(**best) if best else None,
    )


def verify_save(directory: Path, *, digests: bool = True) -> None:
    """Check that a save is there with every byte that was written.

    Raises:
        NemotronError: It is not; the message says what is wrong.
    """
    verify_files(directory, read_artifact(directory, "checkpoint_lora"), digests=digests)


def _start_from(
    load: Path,
    ckpt_step: int | None,
    train_iters: int,
    identity: Mapping[str, Any],
    digests: bool,
) -> Start:
    """Return a fresh start from a save of another run."""
    found = _newest_whole_save(load, ckpt_step=ckpt_step, digests=digests)
    saved = found.saved
    if saved is None:
        which = "intact save" if ckpt_step is None else f"intact save of iteration {ckpt_step}"
        raise NoSaveToLoadError("; ".join([f"{load} has no {which} to resume from", *found.notes]))
    # checkpoint.* says where this run comes from; the save's own says where that run came from.
    own = {key: value for key, value in identity.items() if not key.startswith("checkpoint.")}
    theirs = {k: value for k, value in saved.identity.items() if not k.startswith("checkpoint.")}
    changes = differences(theirs, own) + _nothing_to_do(saved, train_iters)
    if changes:
        raise _mismatch(saved, f"{saved.directory} is from another run", changes)
    return Start(saved, notes=found.notes)


def _nothing_to_do(saved: SavedRun, train_iters: int) -> list[str]:
    """Return why a run resumed from a save would have nothing left to do; empty if it has."""
    is_left = train_iters == saved.iteration and not saved.is_evaluated
    if train_iters > saved.iteration or is_left:
        return []
    return [f"train.train_iters: {saved.train_iters} -> {train_iters} leaves nothing to do"]


def _mismatch(saved: SavedRun, what: str, changes: list[str]) -> ResumeMismatchError:
    return ResumeMismatchError(
        f"{what} (iteration {saved.iteration} of {saved.train_iters}) with other values: "
        + "; ".join(changes)
    )


def _newest_whole_save(
    directory: Path, *, digests: bool, ckpt_step: int | None = None
) -> _FoundSave:
    """Return the newest whole save of a run, or the one of iteration ``ckpt_step``.

    Args:
        directory: Directory that the run saves to.
        digests: Whether the files of a save must have their recorded digests for it to be whole.
        ckpt_step: The only iteration to look at; None for all.
    """
    notes, damaged = [], []
    for iteration, path in list_saves(directory):
        if ckpt_step not in (None, iteration):
            continue
        try:
            verify_save(path, digests=digests)
            if not (path / STATE_FILE).is_file():
                notes.append(f"skipped {path}, which has only the adapter (checkpoint.save_optim)")
                continue
            saved = read_saved(path)
        except (NemotronError, OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(path)
            notes.append(f"skipped {path}, which is damaged: {error.args[0]}")
            continue
        return _FoundSave(saved, tuple(damaged), tuple(notes))
    return _FoundSave(None, tuple(damaged), tuple(notes))
