"""Runs a list of tasks in this process, in a pool of processes, or on Ray, with the same results.

Tasks are independent, idempotent and leave receipts, so an executor only decides where they run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._entry import StopRequestedError, step_error
from nemotron.steps._host import available_cores, peak_host_memory_bytes
from nemotron.steps.data_prep.sft_packing.blend import STEP
from nemotron.steps.data_prep.sft_packing.engine import EngineMismatchError
from nemotron.steps.data_prep.sft_packing.receipts import Receipt

ExecutionMode = Literal["auto", "ray"]
# Work that is worth starting a worker for: about two seconds.
_WORKER_BYTES = 4 << 20
# How long running tasks may take to finish when the run is told to stop.
_STOP_SECONDS = 10.0
# What tells the run to stop; a terminal and a scheduler send it to the workers as well.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Task(Protocol):
    """Something to do, once."""

    @property
    def key(self) -> str:
        """Digest of everything that the result depends on."""
        ...

    @property
    def directory(self) -> Path:
        """Where the receipt is left."""
        ...

    @property
    def size_bytes(self) -> int:
        """About how much work it is."""
        ...

    def run(self) -> tuple[Receipt, bool]:
        """Do the task unless it is done; return the receipt, and whether it was there already."""
        ...


class Outcome(NamedTuple):
    """A finished task.

    Attributes:
        number: Its index in the list.
        receipt: Its receipt.
        was_done: Whether an earlier run had done it.
        peak_bytes: Peak memory of the process that ran it.
    """

    number: int
    receipt: Receipt
    was_done: bool
    peak_bytes: int


def run_tasks(
    tasks: Sequence[Task],
    *,
    num_workers: int | None,
    mode: ExecutionMode,
    on_done: Callable[[Outcome], None],
) -> list[Receipt]:
    """Return the receipts of all tasks, in their order; the largest tasks start first.

    Args:
        tasks: The tasks.
        num_workers: Tasks at a time; with 1 they run in this process. None: as many as the work is
            worth.
        mode: ``auto`` for processes of this host, ``ray`` for Ray.
        on_done: Called for every finished task.

    Raises:
        NemotronError: What a task raised; ``worker_died``.
        EngineMismatchError: See ``TokenizeTask``.
        StopRequestedError: A signal came. Finished tasks have their receipts.
    """
    order = largest_first(tasks)
    num_workers = num_workers or _worth_starting(tasks)
    if mode == "ray":
        outcomes = _on_ray(tasks, order, num_workers)
    elif min(num_workers, len(tasks)) <= 1:
        outcomes = (_here(number, tasks[number]) for number in order)
    else:
        outcomes = _in_pool(tasks, order, min(num_workers, len(tasks)))
    receipts: list[Receipt] = [{}] * len(tasks)
    with contextlib.closing(outcomes):
        for outcome in outcomes:
            receipts[outcome.number] = outcome.receipt
            on_done(outcome)
    return receipts


def largest_first(tasks: Sequence[Task]) -> list[int]:
    """Return the indices of tasks in the order in which they start, the same on all nodes."""
    return sorted(range(len(tasks)), key=lambda number: -tasks[number].size_bytes)


def _worth_starting(tasks: Sequence[Task]) -> int:
    """Return how many workers have work for longer than it takes to start them."""
    work = sum(task.size_bytes for task in tasks)
    return min(available_cores(), 1 + work // _WORKER_BYTES)


def error_from(told: dict[str, Any]) -> NemotronError:
    """Return the error that another process has sent as data."""
    fields = {name: value for name, value in told.items() if name != "errors"}
    code, problem = fields.pop("code"), fields.pop("problem")
    exit_code = ExitCode(fields.pop("exit_code"))
    return NemotronError(code, problem, exit_code=exit_code, **fields)


def _here(number: int, task: Task) -> Outcome:
    receipt, was_done = task.run()
    return Outcome(number, receipt, was_done, peak_host_memory_bytes())


def _remote(number: int, task: Task) -> dict[str, Any]:
    """Run a task in a worker; errors are returned as data, because ours cannot be pickled."""
    try:
        return {"outcome": tuple(_here(number, task))}
    except NemotronError as error:
        return {"error": error.to_dict()}
    except EngineMismatchError as error:
        return {"mismatch": str(error)}


def _received(answer: dict[str, Any]) -> Outcome:
    if "error" in answer:
        raise error_from(answer["error"])
    if "mismatch" in answer:
        raise EngineMismatchError(answer["mismatch"])
    return Outcome(*answer["outcome"])


def _in_pool(tasks: Sequence[Task], order: Sequence[int], num_workers: int) -> Generator[Outcome]:
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    running: set[Future[dict[str, Any]]] = set()
    try:
        queue = iter(order)
        while True:
            # Two tasks per worker are queued; the others are not pickled before their turn.
            while len(running) < 2 * num_workers and (number := next(queue, None)) is not None:
                with _blocked_signals():  # a worker that this starts inherits that
                    running.add(pool.submit(_remote, number, tasks[number]))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield _received(future.result())
    except BrokenProcessPool:
        problem = "a worker process died; the kernel kills processes when memory runs out"
        raise step_error(STEP, "worker_died", problem, where=f"{num_workers} worker(s)") from None
    except BaseException as error:
        if isinstance(error, StopRequestedError):
            wait({future for future in running if not future.cancel()}, timeout=_STOP_SECONDS)
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Keep the signals that stop the run until the block has ended.

    A worker inherits the block, which ends in ``_start_worker``: a signal that came before it
    ignores them would kill the worker, and the run would end as if memory had run out.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Set up a worker: it uses one core, leaves signals to its parent, and ends with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _on_ray(tasks: Sequence[Task], order: Sequence[int], num_workers: int) -> Generator[Outcome]:
    options: dict[str, Any] = {"log_to_driver": False}
    if not os.environ.get("RAY_ADDRESS"):
        options |= {"num_cpus": num_workers, "address": "local", "include_dashboard": False}
    with connected_ray(**options) as ray:
        remote = ray.remote(num_cpus=1)(_remote)
        queue = iter(order)
        running: list[Any] = []
        width = 2 * int(ray.cluster_resources().get("CPU", num_workers))
        while True:
            while len(running) < width and (number := next(queue, None)) is not None:
                running.append(remote.remote(number, tasks[number]))
            if not running:
                return
            done, running = ray.wait(running)
            yield _received(ray.get(done[0]))


@contextlib.contextmanager
def connected_ray(**options: Any) -> Iterator[Any]:
    """Yield the module ``ray``, connected; our handler of SIGTERM is restored.

    Raises:
        NemotronError: ``ray_missing``.
    """
    try:
        import ray
    except ImportError:
        raise ray_missing() from None
    on_stop = signal.getsignal(signal.SIGTERM)
    with ray.init(**options):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_stop)
        yield ray


def ray_missing() -> NemotronError:
    """Return the error of a run on Ray without Ray."""
    problem = "execution_mode is ray, but the package ray is not installed"
    return step_error(STEP, "ray_missing", problem)
