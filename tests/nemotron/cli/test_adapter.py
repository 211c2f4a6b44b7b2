"""``nemotron adapter`` as it is typed: the work happens elsewhere, errors come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.cli.app import main
from nemotron.errors import ExitCode


def test_an_error_of_the_process_that_did_the_work_comes_back_as_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "verify", str(tmp_path), "--json"]) == ExitCode.DATA
    captured = capfd.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "adapter_missing"
    assert captured.err == ""


def test_an_unknown_layout_is_refused_here(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", "export", "a", "b", "--to", "gguf"]) == ExitCode.USAGE
    assert "megatron_bridge" in capfd.readouterr().err


def test_the_help_of_every_command_needs_no_torch() -> None:
    script = (
        "import sys; from nemotron.cli.app import main\n"
        "codes = [main(['adapter', name, '--help']) for name in ('verify', 'diff', 'export')]\n"
        "assert codes == [0, 0, 0]; assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "megatron_bridge|peft" in done.stdout
