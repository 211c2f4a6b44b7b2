"""The process groups of a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("groups_worker.py")


def test_every_group_has_the_timeout_that_was_asked_for(run_ranks: Callable[..., Any]) -> None:
    assert run_ranks(WORKER, 4) == {"tensor": 180.0, "pipeline": 180.0}
