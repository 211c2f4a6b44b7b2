"""Where a run starts: afresh, or at the newest save that is whole and of the same run.

Torch-free, because the launcher asks before it starts anything. A save is resumed only by a run
that would have come to the same save: what the result depends on is stored in it, as ``identity``
(dotted config keys and digests of the inputs), and compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
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
class Start:
    """How a run starts.

    Attributes:
        saved: The save to go on from; None: afresh.
        is_in_place: Whether the run goes on in the directory that it saves to.
        damaged: Saves of that directory that cannot be used.
        notes: Lines to print.
    """

    saved: SavedRun | None = None
    is_in_place: bool = False
    damaged: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_start(
    output: Path,
    *,
    load: Path | None,
    ckpt_step: int | None,
    train_iters: int,
    identity: Mapping[str, Any],
    digests: bool = True,
) -> Start:
    """Return where a run into ``output`` starts.

    Its own unfinished run goes first, so that a requeued job goes on where it was stopped; then
    ``load``. A finished run goes on only if ``train_iters`` was raised and nothing else changed.

    Args:
        output: Directory that the run saves to.
        load: Directory of another run to go on from, in a directory of its own; None: none.
        ckpt_step: The iteration of ``load`` to take; None: its newest whole save.
        train_iters: Optimizer steps of the run.
        identity: What the run's result depends on.
        digests: Whether to hash the files of a save before it counts as whole.

    Raises:
        ResumeMismatchError: The save to go on from is of a run with other values.
        NoSaveToLoadError: ``load`` has no save, or not that of ``ckpt_step``.
    """
    start = _newest(output, digests=digests)
    if start.saved is not None:
        changes = differences(start.saved.identity, identity)
        if not start.saved.is_finished:
            changes += _nothing_to_do(start.saved, train_iters)
            if changes:
                raise _mismatch(start.saved, f"{output} holds an unfinished run", changes)
            return start
        if train_iters > start.saved.iteration:
            if not changes:
                return start
            start.notes.append(
                f"the finished run in {output} is not continued, since {'; '.join(changes)}"
            )
    if load is None:
        return Start(notes=start.notes)
    return _loaded(load, ckpt_step, train_iters, identity, digests)


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


def _loaded(
    load: Path,
    ckpt_step: int | None,
    train_iters: int,
    identity: Mapping[str, Any],
    digests: bool,
) -> Start:
    start = _newest(load, ckpt_step=ckpt_step, digests=digests)
    saved = start.saved
    if saved is None:
        which = "whole save" if ckpt_step is None else f"whole save of iteration {ckpt_step}"
        raise NoSaveToLoadError("; ".join([f"{load} has no {which} to resume from", *start.notes]))
    # Where a run came from is a matter of the run, not of the save that it came from.
    own = {key: value for key, value in identity.items() if not key.startswith("checkpoint.")}
    theirs = {k: value for k, value in saved.identity.items() if not k.startswith("checkpoint.")}
    changes = differences(theirs, own) + _nothing_to_do(saved, train_iters)
    if changes:
        raise _mismatch(saved, f"{saved.directory} is of another run", changes)
    return Start(saved, notes=start.notes)


def _nothing_to_do(saved: SavedRun, train_iters: int) -> list[str]:
    """Return what is wrong with a run that would end before it began."""
    is_left = train_iters == saved.iteration and not saved.is_evaluated
    if train_iters > saved.iteration or is_left:
        return []
    return [f"train.train_iters: {saved.train_iters} -> {train_iters} leaves nothing to do"]


def _mismatch(saved: SavedRun, what: str, changes: list[str]) -> ResumeMismatchError:
    return ResumeMismatchError(
        f"{what} (iteration {saved.iteration} of {saved.train_iters}) with other values: "
        + "; ".join(changes)
    )


def _newest(directory: Path, *, digests: bool, ckpt_step: int | None = None) -> Start:
    """Return a start at the newest whole save; those passed over are named in its notes."""
    notes, damaged = [], []
    for iteration, path in list_saves(directory):
        if ckpt_step not in (None, iteration):
            continue
        try:
            verify_save(path, digests=digests)
            if not (path / STATE_FILE).is_file():
                notes.append(f"{path} is an adapter only (checkpoint.save_optim), passed over")
                continue
            saved = read_saved(path)
        except (NemotronError, OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(path)
            notes.append(f"{path} is damaged and passed over: {error.args[0]}")
            continue
        return Start(saved, is_in_place=True, damaged=damaged, notes=notes)
    return Start(notes=notes)
