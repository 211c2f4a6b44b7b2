"""Work on many things at a time, by threads that end with the first error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

# Tensors, or files of one tensor after the other, that are read or written at a time: as a rule a
# block of each is held, and one whole where it was saved in pieces.
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
    """Return ``work`` of each, in their order; the first that fails, or an interrupt, is raised.

    What has not begun by then is not done, and what has begun is waited for.

    Args:
        work: Called by other threads, under the settings of torch that are the caller's.
        each: What to work on.
        num_threads: Calls at a time.
        stop: Called where one fails, so that those that have begun may end soon.
    """
    with ThreadPoolExecutor(num_threads) as threads:
        # Whichever way torch keeps its settings.
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
