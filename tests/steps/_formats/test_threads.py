"""Threads that end with the first error."""

from __future__ import annotations

import signal
from threading import Event, current_thread, main_thread

import pytest
from torch.serialization import get_crc32_options

from nemotron.steps._formats.threads import in_threads
from nemotron.steps._formats.torch_dist_writer import without_crc32


def test_the_results_are_in_order_and_the_callers_settings_hold() -> None:
    with without_crc32():
        results = in_threads(lambda x: (x, get_crc32_options()), "abc", num_threads=2)
    assert results == [("a", False), ("b", False), ("c", False)]


def test_after_an_error_nothing_begins_and_what_has_begun_is_told_to_stop() -> None:
    stopped, begun = Event(), []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise KeyError("mine")
        assert stopped.wait(60)

    with pytest.raises(KeyError, match="mine"):
        in_threads(work, [0, 1, 0, 0, 0, 0], num_threads=2, stop=stopped.set)
    assert len(begun) < 6


def test_an_interrupt_ends_the_threads_too() -> None:
    stopped = Event()

    def work(number: int) -> None:
        assert current_thread().name != "MainThread"
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)
        assert stopped.wait(60)

    with pytest.raises(KeyboardInterrupt):
        in_threads(work, [0], num_threads=1, stop=stopped.set)
