"""What a run does before its first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

IMPORTS_STEP = Path(__file__).with_name("imports_step.py")


def test_a_run_does_not_wait_for_imports_that_it_has_no_use_for(launch: Callable[..., Any]) -> None:
    run = launch(str(IMPORTS_STEP)).end()
    assert run.exit_code == 0, run.stderr
    assert "imported []" in run.stderr
