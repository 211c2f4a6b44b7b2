"""``nemotron adapter verify | diff | export``: the work is done by a process that imports torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nemotron.cli.options import Debug, Json
from nemotron.config import dump
from nemotron.errors import ExitCode, NemotronError
from nemotron.launch.ending import reported_error

app = typer.Typer(
    help="Verify, compare and export LoRA adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Adapter = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT adapter, Megatron-Bridge adapter checkpoint, or output root of either.",
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Base, Megatron or Hugging Face; default: the one recorded."),
]


@app.command("verify")
def verify(adapter: Adapter, base: Base = None, as_json: Json = False, debug: Debug = False) -> int:
    """Check an adapter and its base as a merge does, and print the overrides it needs."""
    return _run("verify", {"adapter": adapter, "base": base}, as_json=as_json)


@app.command("diff")
def diff(
    adapter: Adapter,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The adapter to compare with.")],
    base: Base = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Compare what two adapters of the same base add to its weights."""
    return _run("diff", {"adapter": adapter, "other": other, "base": base}, as_json=as_json)


@app.command("export")
def export(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to write.")],
    to: Annotated[
        Literal["megatron_bridge", "peft"], typer.Option(help="Layout to write.")
    ] = "megatron_bridge",
    base: Base = None,
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Write an adapter in Megatron-Bridge's layout, or in PEFT's."""
    values = {"adapter": adapter, "output": output, "layout": to, "base": base}
    return _run("export", values, as_json=as_json)


def _run(command: str, values: dict[str, Any], *, as_json: bool) -> int:
    """Run a command of ``nemotron.steps._adapter`` and return its exit code."""
    with tempfile.TemporaryDirectory() as made:
        config, error = Path(made) / "config.yaml", Path(made) / "error.json"
        paths = {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}
        config.write_text(dump(paths | {"as_json": as_json}), encoding="utf-8")
        argv = [sys.executable, "-m", f"nemotron.steps._adapter.{command}", "--config", str(config)]
        done = subprocess.run(
            argv,
            env={**os.environ, "NEMOTRON_ERROR_FILE": str(error)},
            # A reader that leaves early would be an error to the process; main() knows it is none.
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if as_json else None,
            check=False,
        )
        reported = reported_error(error)
    death = None if reported else _death(done)
    if not (death and as_json):  # one document, not half of another before it
        print(done.stdout.decode(errors="replace"), end="", flush=True)
    if death:
        raise death
    if as_json and reported:
        print(json.dumps({"error": reported}, indent=2))
    return done.returncode if done.returncode >= 0 else int(ExitCode.FAILED)


def _death(done: subprocess.CompletedProcess[bytes]) -> NemotronError | None:
    """Return the error of a process that failed without reporting one; None if it did not fail.

    None as well where the process has printed on the terminal what went wrong.
    """
    code, is_seen = done.returncode, done.stderr is None
    if code in (ExitCode.OK, ExitCode.PREEMPTED, ExitCode.INTERRUPTED):
        return None
    if code > 0 and is_seen:  # only a killed process has printed nothing
        return None
    said = "" if is_seen else done.stderr.decode(errors="replace").strip()
    if code < 0:
        how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
        fix, exit_code = (
            "signal 9 usually means that memory ran out: use a machine with more",
            ExitCode.RANK_DIED,
        )
    else:
        how, fix = f"ended with exit code {code}", "run it without --json to see all of its output"
        exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.FAILED
    return NemotronError(
        "adapter_failed",
        f"the worker process {how} without reporting an error",
        why=said.rpartition("\n")[2].strip(),
        fix=fix,
        exit_code=exit_code,
    )
