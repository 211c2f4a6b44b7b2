"""Reads the input of the next step in another thread, while this step computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

READER = "read-ahead"  # prefix of the threads' names
T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls a function for consecutive numbers, each in advance of being asked for it.

    Args:
        read: Called in another thread, never twice at the same time.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, number: int, *, has_next: bool) -> T:
        """Return what was read for a number; with ``has_next``, begin to read for the next one.

        Raises:
            Exception: What ``read`` raised for this number.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != number:
            wait([ahead[1]] if ahead else [])
            ahead = number, self._start(number)
        result = ahead[1].result()
        if has_next:
            self._ahead = number + 1, self._start(number + 1)
        return result

    def _start(self, number: int) -> Future[T]:
        thread = ThreadPoolExecutor(1, READER)
        future = thread.submit(self._read, number)
        thread.shutdown(wait=False)  # the thread ends after this read, even if the run has failed
        return future
