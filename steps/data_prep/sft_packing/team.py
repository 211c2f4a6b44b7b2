"""One run on several nodes: the first node leads it, the others do their share of each stage.

The nodes meet on the *board*, a directory in the work directory beside the output, which has to be
on a file system that all of them see; there is no other connection. The leader notes there what is
to be done, the others what they have done of it. Each node plans the tasks for itself, from the
same config and files, and takes every N-th. If a node dies, the scheduler ends the job; the
receipts of finished tasks stay, and the same command continues from them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemotron.artifacts import sha256_json
from nemotron.errors import NemotronError
from nemotron.steps._entry import StopRequestedError, step_error
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.board import Note, NoteFile
from nemotron.steps.data_prep.sft_packing.engine import EngineMismatchError
from nemotron.steps.data_prep.sft_packing.executors import Outcome, Task, error_from, largest_first
from nemotron.steps.data_prep.sft_packing.receipts import Receipt, read_receipt

Stage = Literal["tokenize", "pack"]
OnDone = Callable[[Outcome], None]
# Runs tasks on this node, and calls OnDone for each.
Work = Callable[[Sequence[Task], OnDone], object]
# How far apart the nodes of a job may start: one may still pull an image that another one has.
_MEET_SECONDS = 600.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Order:
    """The leader's order to work on a stage.

    Attributes:
        number: Number of the order in the run.
        stage: Name of the stage.
        engine: The engine that encodes text.
        pack_key: Digest of everything that the output depends on. The leader's counts for all
            nodes, since it depends on paths, which may differ from node to node.
        tasks: Digest of the keys of the tasks, which must be the same on all nodes.
    """

    number: int
    stage: Stage
    engine: str
    pack_key: str
    tasks: str


class Leader:
    """The first node, which plans, publishes and reports.

    Args:
        board: The directory where the nodes meet.
        count: How many nodes there are.
    """

    def __init__(self, board: Path, count: int) -> None:
        self.count = count
        self._board = board
        self._own = NoteFile(board / "node-0")
        self._others = [NoteFile(board / f"node-{index}") for index in range(1, count)]
        self._num_orders = 0
        self._num_left = 0

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Open the board; at the end dismiss the others and remove it."""
        self._board.mkdir(parents=True, exist_ok=True)
        try:
            self._own.append(here=socket.gethostname())
            yield
            self._own.append(end=True)
            _wait(self._have_left, _MEET_SECONDS)
        finally:
            # Renamed first, so that nobody writes into it while it is removed.
            gone = self._board.with_name(f"{self._board.name}.gone")
            with contextlib.suppress(OSError):
                self._board.rename(gone)
                shutil.rmtree(gone)
                self._board.parent.rmdir()

    def share(
        self,
        stage: Stage,
        tasks: Sequence[Task],
        *,
        engine: str,
        pack_key: str,
        work: Work,
        on_done: OnDone,
    ) -> list[Receipt]:
        """Do this node's share of a stage, wait for the others' and return all receipts in order.

        Args:
            stage: The stage.
            tasks: All of its tasks.
            engine: The engine that encodes text.
            pack_key: Digest of everything that the output depends on.
            work: Runs tasks on this node.
            on_done: Called for every finished task, of all nodes.

        Raises:
            NemotronError: What ``work`` raises, on any node; ``nodes_apart``.
            EngineMismatchError: On any node.
        """
        order = Order(self._num_orders, stage, engine, pack_key, _digest(tasks))
        self._num_orders += 1
        self._own.append(order=vars(order))
        results = _Results(tasks, on_done)
        mine = _share(tasks, 0, self.count)

        def done_here(outcome: Outcome) -> None:
            results.add(outcome._replace(number=mine[outcome.number]))
            self._collect(order, results)

        work([tasks[number] for number in mine], done_here)
        end = time.monotonic() + _MEET_SECONDS
        while results.missing:
            self._collect(order, results)
            if time.monotonic() > end and not all(other.exists() for other in self._others):
                raise _apart("a node did not join", self._board)
            time.sleep(_POLL_SECONDS)
        return results.receipts

    def meet(self, is_complete: Callable[[], bool]) -> None:
        """Wait until all nodes are there.

        Raises:
            NemotronError: What another node reports; ``nodes_apart``.
        """

        def have_met() -> bool:
            self._notes()
            return is_complete()

        if not _wait(have_met, _MEET_SECONDS):
            raise _apart("a node did not join", self._board)

    def _collect(self, order: Order, results: _Results) -> None:
        """Add what the others have done of a stage since the last time."""
        for note in self._told(order):
            task = results.tasks[note["task"]]
            receipt = read_receipt(task.directory, task.key)
            results.add(Outcome(note["task"], receipt, note["was_done"], note["peak_bytes"]))

    def _notes(self) -> list[Note]:
        """Return the others' notes since the last time; raise what ended one of them."""
        notes = [note for other in self._others for note in other.read_new()]
        for note in notes:
            if "error" in note:
                raise error_from(note["error"])
            if "stopped" in note:
                raise StopRequestedError("stopped together with another node")
        return notes

    def _told(self, order: Order) -> list[Note]:
        """Return the others' notes on a stage since the last time."""
        of_stage = [note for note in self._notes() if note.get("stage") == order.number]
        for note in of_stage:
            if "mismatch" in note:
                raise EngineMismatchError(note["mismatch"])
        return of_stage

    def _have_left(self) -> bool:
        notes = [note for other in self._others for note in other.read_new()]
        self._num_left += sum("left" in note for note in notes)
        return self._num_left == len(self._others)


class _Results:
    """The receipts of a stage's tasks, as they come in from all nodes."""

    def __init__(self, tasks: Sequence[Task], on_done: OnDone) -> None:
        self.tasks = tasks
        self.receipts: list[Receipt] = [{}] * len(tasks)
        self.missing = set(range(len(tasks)))
        self._on_done = on_done

    def add(self, outcome: Outcome) -> None:
        self.missing.remove(outcome.number)
        self.receipts[outcome.number] = outcome.receipt
        self._on_done(outcome)


class Helper:
    """A node that does its share of what the leader asks for.

    Args:
        board: The directory where the nodes meet.
        count: How many nodes there are.
        index: The number of this one, from 1.
    """

    def __init__(self, board: Path, count: int, index: int) -> None:
        self._board = board
        self._count = count
        self._index = index
        self._own = NoteFile(board / f"node-{index}")
        self._leader = NoteFile(board / "node-0")

    @contextlib.contextmanager
    def helping(self) -> Iterator[None]:
        """Wait for the leader; report to it if the block fails.

        Raises:
            NemotronError: ``nodes_apart``.
        """
        if not _wait(self._leader.exists, _MEET_SECONDS):
            raise _apart("the first node did not join", self._board)
        self._own.append(here=socket.gethostname())
        try:
            yield
        except NemotronError as error:
            self._own.append(error=error.to_dict())
            raise
        except StopRequestedError:
            self._own.append(stopped=True)
            raise

    def orders(self) -> Iterator[Order]:
        """Yield the leader's orders until it dismisses its helpers or fails."""
        while self._board.is_dir():
            for note in self._leader.read_new():
                if "order" in note:
                    yield Order(**note["order"])
                elif "end" in note:
                    self._own.append(left=True)
                    return
            time.sleep(_POLL_SECONDS)

    def stay(self, is_well: Callable[[], bool]) -> bool:
        """Wait until the leader dismisses its helpers; return whether ``is_well`` held so long."""
        while self._board.is_dir():
            if any("end" in note for note in self._leader.read_new()):
                self._own.append(left=True)
                return True
            if not is_well():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def do(self, order: Order, tasks: Sequence[Task], work: Work) -> None:
        """Do this node's share of a stage and report it to the leader.

        Raises:
            NemotronError: What ``work`` raises; ``nodes_apart``: the leader has other tasks.
        """
        if _digest(tasks) != order.tasks:
            problem = f"this node sees different inputs to {order.stage} than the first one"
            raise step_error(STEP, "nodes_apart", problem, where=str(self._board))
        mine = _share(tasks, self._index, self._count)

        def done(outcome: Outcome) -> None:
            told = {"was_done": outcome.was_done, "peak_bytes": outcome.peak_bytes}
            self._own.append(stage=order.number, task=mine[outcome.number], **told)

        try:
            work([tasks[number] for number in mine], done)
        except EngineMismatchError as error:
            self._own.append(stage=order.number, mismatch=str(error))


def role_of(work: Path, environment: Mapping[str, str] = os.environ) -> Leader | Helper | None:
    """Return this node's role in a run of several nodes; None if it is the only one.

    Args:
        work: The work directory, in which the board is.
        environment: Has ``NEMOTRON_NODES`` and ``NEMOTRON_NODE``, which the job's script sets, and
            ``NEMOTRON_JOB`` and ``NEMOTRON_START``, which identify this start of this job.
    """
    count = int(environment.get("NEMOTRON_NODES", "1"))
    if count == 1:
        return None
    board = work / f"nodes-{environment['NEMOTRON_JOB']}-{environment['NEMOTRON_START']}"
    index = int(environment["NEMOTRON_NODE"])
    return Helper(board, count, index) if index else Leader(board, count)


def _digest(tasks: Sequence[Task]) -> str:
    return sha256_json([task.key for task in tasks])


def _share(tasks: Sequence[Task], index: int, count: int) -> list[int]:
    return largest_first(tasks)[index::count]


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _apart(problem: str, board: Path) -> NemotronError:
    found = f"{problem} within {_MEET_SECONDS:.0f} s, or sees a different directory there"
    return step_error(STEP, "nodes_apart", found, where=str(board))
