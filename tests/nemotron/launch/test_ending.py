"""nemotron.launch.ending: what an exit means."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from nemotron.launch.ending import ending

INT, TERM, USR1, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "told_by", "exit_code", "error"),
    [
        (0, [], 0, None),
        (0, [TERM], 0, None),  # it was through before it could be stopped
        (75, [], 75, None),
        (130, [], 130, None),
        (130, [INT], 130, None),
        (-TERM, [TERM], 75, None),  # so early that nothing could be saved, or needed to be
        (128 + TERM, [TERM], 75, None),
        (-USR1, [USR1], 75, None),
        (-INT, [INT], 130, None),
        (-KILL, [INT, INT], 130, None),
        (-KILL, [TERM], 8, "job_killed"),
        (-TERM, [], 8, "job_killed"),
        (137, [], 8, "job_killed"),
        (-signal.SIGRTMIN - 1, [], 8, "job_killed"),
        (1, [TERM], 1, "job_failed"),
        (1, [INT], 130, None),
        (4, [], 4, "job_failed"),
        (127, [], 127, "job_failed"),
        (255, [], 255, "job_failed"),
    ],
)
def test_what_an_exit_without_a_word_means(
    code: int, told_by: list[int], exit_code: int, error: str | None
) -> None:
    end = ending(code, told_by=told_by)
    assert (end.exit_code, end.error and end.error["code"]) == (exit_code, error)
    if end.error is not None:
        assert end.error["exit_code"] == exit_code
        assert f"error[{error}]" in end.news


def report(code: str, exit_code: int) -> dict[str, Any]:
    return {"code": code, "problem": "x", "exit_code": exit_code}


@pytest.mark.parametrize(
    ("code", "told_by", "reported", "exit_code"),
    [
        (1, [], report("too_odd", 4), 4),
        (6, [TERM], report("save_failed", 6), 6),  # told to stop, and could not save
        (75, [TERM], report("save_failed", 6), 6),  # another rank could
        (130, [INT], report("unexpected", 1), 130),  # a rank missed the one that had stopped
        (1, [], report("unexpected", 1), 1),
    ],
)
def test_what_the_job_reported_goes_before_what_its_exit_code_says(
    code: int, told_by: list[int], reported: dict[str, Any], exit_code: int
) -> None:
    end = ending(code, told_by=told_by, reported=reported)
    assert end.exit_code == exit_code
    assert end.error == (reported if exit_code == reported["exit_code"] else None)
    assert not end.news
