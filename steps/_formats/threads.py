"""Works on many things at a time, in threads that stop at the first error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

# How many tensors or files are read or written at a time. Usually a block of each is held; a tensor
# that was saved in pieces is held whole.
NUM_AT_A_TIME = min(4, os.cpu_count() or 1)

Each = TypeVar("Each")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Each], Result],
    each: Iterable[Each],
    *,
    num_threads: int,
    stop: Callable[[], None] | None = None,
) -> list[Result]:
    """Return the results of ``work`` in the order of ``each``; raise the first error or interrupt.

    After an error, calls that have not begun are dropped, and those that have begun are waited for.

    Args:
        work: Called in other threads, with the caller's settings of torch.
        each: What to work on.
        num_threads: Calls at a time.
        stop: Called after an error, so that calls that have begun can end soon.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        # The context is copied because torch may keep some of its settings there.
        running = [threads.submit(copy_context().run, work, one) for one in each]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            failed = [future for future in running if future in done and future.exception()]
            return [future.result() for future in failed or running]
        except BaseException:
            if stop is not None:
                stop()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
