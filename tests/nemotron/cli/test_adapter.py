"""``nemotron adapter`` as it is typed: the work happens elsewhere, errors come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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


def test_a_path_is_taken_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "lr=${lr} [1]: #2"
    adapter.mkdir()
    assert main(["adapter", "verify", str(adapter), "--json"]) == ExitCode.DATA
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["code"], error["where"]) == ("adapter_missing", str(adapter))


@pytest.fixture
def torch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a program in the place of torch, for processes alone."""

    def put(program: str) -> None:
        (tmp_path / "torch.py").write_text(program)
        before = os.environ.get("PYTHONPATH", "")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{before}")

    return put


@pytest.mark.parametrize(
    ("program", "exit_code", "problem", "why"),
    [
        ("raise ImportError('no libcuda')", 1, "exit code 1", "ImportError: no libcuda"),
        ("raise SystemExit(6)", ExitCode.IO, "exit code 6", ""),
        (
            "import os; os.write(2, b'so much'); os.kill(os.getpid(), 9)",
            ExitCode.RANK_DIED,
            "signal 9",
            "so much",
        ),
    ],
)
def test_a_process_that_dies_without_an_error_is_told_as_json(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    torch_is: Callable[[str], None],
    program: str,
    exit_code: int,
    problem: str,
    why: str,
) -> None:
    torch_is(program)
    assert main(["adapter", "verify", str(tmp_path), "--json"]) == exit_code
    captured = capfd.readouterr()
    error = json.loads(captured.out)["error"]
    assert (error["code"], error["exit_code"]) == ("adapter_failed", exit_code)
    assert problem in error["problem"]
    assert why in error["why"]
    assert captured.err == ""


def test_what_is_printed_for_people_is_not_told_twice_and_a_kill_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], torch_is: Callable[[str], None]
) -> None:
    torch_is("raise ImportError('no libcuda')")
    assert main(["adapter", "verify", str(tmp_path)]) == ExitCode.FAILED
    said = capfd.readouterr().err
    assert "ImportError: no libcuda" in said
    assert "error[" not in said
    torch_is("import os; os.kill(os.getpid(), 9)")
    assert main(["adapter", "verify", str(tmp_path)]) == ExitCode.RANK_DIED
    assert "error[adapter_failed]" in capfd.readouterr().err


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
