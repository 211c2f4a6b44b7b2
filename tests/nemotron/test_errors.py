"""nemotron.errors: how an error reads, and how several are one."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nemotron.errors import (
    CombinedError,
    ExitCode,
    NemotronError,
    raise_all,
    system_refusal,
    writing,
)


def test_error_prints_code_problem_place_cause_and_fix_in_that_order() -> None:
    error = NemotronError("bad", "a is 3; wanted 4", where="x.yaml:7", why="it was", fix="set a: 4")
    assert str(error).splitlines() == [
        "error[bad]: a is 3; wanted 4",
        "  where: x.yaml:7",
        "  why: it was",
        "  fix: set a: 4",
    ]


def test_error_leaves_empty_parts_out_and_exits_with_2() -> None:
    error = NemotronError("bad", "no")
    assert str(error) == "error[bad]: no"
    assert error.exit_code is ExitCode.USAGE


def test_error_as_data_is_json() -> None:
    error = NemotronError("bad", "no", fix="yes", exit_code=ExitCode.DATA)
    assert json.loads(json.dumps(error.to_dict())) == {
        "code": "bad",
        "problem": "no",
        "where": "",
        "why": "",
        "fix": "yes",
        "exit_code": 4,
    }


def test_exit_codes_are_the_documented_ones() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "PREFLIGHT": 3,
        "DATA": 4,
        "NUMERIC": 5,
        "IO": 6,
        "LOCKED": 7,
        "RANK_DIED": 8,
        "SUBMISSION": 9,
        "PREEMPTED": 75,
        "INTERRUPTED": 130,
    }


def test_raise_all_raises_nothing_one_or_all() -> None:
    first = NemotronError("one", "1", exit_code=ExitCode.PREFLIGHT)
    second = NemotronError("two", "2")
    raise_all([])
    with pytest.raises(NemotronError) as single:
        raise_all([first])
    assert single.value is first
    with pytest.raises(CombinedError) as both:
        raise_all([first, second])
    assert str(both.value) == "error[one]: 1\nerror[two]: 2"
    assert both.value.exit_code is ExitCode.PREFLIGHT
    assert [error["code"] for error in both.value.to_dict()["errors"]] == ["one", "two"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_without_room_names_what_was_written_and_asks_for_room(number: int) -> None:
    with pytest.raises(OSError, match="out") as caught, writing(Path("out")):
        raise OSError(number, os.strerror(number))
    refused = system_refusal(caught.value, origin="output_file.py:65")
    assert refused is not None
    assert (refused.where, refused.exit_code) == ("out", ExitCode.IO)
    assert refused.fix.startswith("free space there")


def test_a_copy_without_room_names_the_copy() -> None:
    # As shutil raises it.
    refused = system_refusal(OSError(errno.ENOSPC, "No space left on device", "in", None, "out"))
    assert refused is not None
    assert refused.where == "out"


def test_what_is_read_in_vain_is_not_taken_for_what_is_written() -> None:
    with pytest.raises(FileNotFoundError) as caught, writing("out"):
        Path("in").read_bytes()
    refused = system_refusal(caught.value)
    assert refused is not None
    assert refused.where == "in"
    assert refused.fix.startswith("check that it exists")
