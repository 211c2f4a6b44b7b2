"""nemotron.steps._training.read_ahead: what is read when, and where its errors come out."""

from __future__ import annotations

import threading
import time

import pytest

from nemotron.steps._training.read_ahead import ReadAhead


class Reads:
    """Reads numbers: which, and how many at once at most."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.most_at_once, self._at_once = 0, 0
        self.next_is_read = threading.Event()

    def __call__(self, number: int) -> int:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        self.numbers.append(number)
        time.sleep(0.001)
        if number == 3:
            raise ValueError("3 is bad")
        self._at_once -= 1
        if number == 2:
            self.next_is_read.set()
        return 10 * number


def test_the_next_number_is_read_before_it_is_asked_for() -> None:
    reads = Reads()
    ahead = ReadAhead(reads)
    assert ahead.take(1, has_next=True) == 10
    assert reads.next_is_read.wait(10)
    assert ahead.take(2, has_next=False) == 20
    assert reads.numbers == [1, 2]


def test_an_error_is_raised_where_its_number_is_taken_and_not_before() -> None:
    ahead = ReadAhead(Reads())
    assert [ahead.take(number, has_next=True) for number in (1, 2)] == [10, 20]
    with pytest.raises(ValueError, match="3 is bad"):
        ahead.take(3, has_next=True)


def test_another_number_than_the_next_is_read_after_what_is_being_read() -> None:
    reads = Reads()
    ahead = ReadAhead(reads)
    assert [ahead.take(number, has_next=True) for number in (1, 7, 8)] == [10, 70, 80]
    ahead.take(9, has_next=False)
    assert reads.numbers == [1, 2, 7, 8, 9]
    assert reads.most_at_once == 1


def test_no_thread_is_left_once_the_last_number_is_taken() -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(Reads())
    ahead.take(1, has_next=True)
    ahead.take(2, has_next=False)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
