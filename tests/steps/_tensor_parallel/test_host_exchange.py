"""Collectives through a host's shared memory, by real ranks (exchange_worker.py)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Fork

WORKER = Path(__file__).with_name("exchange_worker.py")
OWN_PIDS = ["unshare", "--pid", "--fork", "--mount-proc"]


def test_sums_and_rows_are_exact_for_tensors_of_any_type_and_size_one_after_the_other(
    run_ranks: Callable[..., Any],
) -> None:
    right = run_ranks(WORKER, 3, "sums")
    assert len(right) == 4 * 7 * (4 + 1) + 3
    assert all(right.values()), right


def test_a_rank_that_shows_another_size_or_has_gone_is_named(run_ranks: Callable[..., Any]) -> None:
    told = run_ranks(WORKER, 3, "lost")
    assert told["other size"] == (
        "DistNetworkError: rank 1 of the group shows another tensor: 20 bytes, not 16"
    )
    # As gloo words it: what says so waits for the rank that can tell why.
    assert told["gone"].startswith("DistNetworkError: connection closed by peer: rank ")


@pytest.mark.parametrize("hindrance", ["forbidden", "unknown"])
def test_ranks_that_may_not_or_cannot_tell_go_on_without_shared_memory(
    hindrance: str, run_ranks: Callable[..., Any]
) -> None:
    assert run_ranks(WORKER, 2, hindrance) == {"exchange": False, "total": 3.0}


@pytest.mark.parametrize("is_apart", [False, True])
def test_ranks_that_do_not_see_each_other_go_on_without_shared_memory(
    is_apart: bool, fork: Fork, tmp_path: Path
) -> None:
    if is_apart:
        _need_own_pids()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    words, output = ["whether", str(tmp_path / "report.json")], tmp_path / "output"
    first, second = ({**meeting, "WORLD_SIZE": "2", "RANK": rank} for rank in "01")
    ranks = [fork(str(WORKER), words, output=output, **first)]
    if is_apart:
        command = [*OWN_PIDS, sys.executable, str(WORKER), *words]
        subprocess.run(command, env={**os.environ, **second}, check=True, timeout=60)
    else:
        ranks.append(fork(str(WORKER), words, output=output, **second))
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0, output.read_text(encoding="utf-8")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == {"exchange": not is_apart, "total": 3.0}


def _need_own_pids() -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run([*OWN_PIDS, "true"], check=False).returncode
    ):
        pytest.skip("this machine does not let us make a PID namespace")
