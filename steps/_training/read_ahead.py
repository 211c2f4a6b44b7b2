"""What the next step works on, read in a thread while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

READER = "read-ahead"  # how the names of the threads begin
T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls a function for one number after the other, each before it is asked for.

    Args:
        read: Called in another thread, once at a time.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._ahead: tuple[int, Future[T]] | None = None

    def take(self, number: int, *, has_next: bool) -> T:
        """Return what was read for a number, or raise what was raised; then read the next one's."""
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
        thread.shutdown(wait=False)  # it ends with this read, whatever becomes of the run
        return future
