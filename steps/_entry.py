"""How every step starts and ends: read ``--config``, run, report one error, exit with its code.

The launcher hands a step one file, its resolved config. A step answers with its exit code and, when
it failed, with the error as JSON in the file that ``NEMOTRON_ERROR_FILE`` names: torchrun turns
every failure into exit code 1, so the file is how the real code reaches the launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

import nemotron
from nemotron.artifacts import Producer, sha256_json
from nemotron.config import Schema, load_config
from nemotron.errors import ExitCode, NemotronError, system_refusal

# Errors of collectives when another rank has gone; the cause is reported by whoever knows it.
_LOST_CONNECTION = re.compile(r"^Dist(Backend|Network|Store)Error|gloo/transport|by peer")
_SECONDS_FOR_THE_CAUSE = 2.0
STEPS_ROOT = Path(__file__).parent
S = TypeVar("S", bound=Schema)


class PreemptedError(Exception):
    """The step was asked to stop before its end; when started again, it continues there."""


class StopRequestedError(BaseException):
    """SIGTERM or SIGUSR1 came to a step without ranks; no ``except Exception`` catches it."""


class _ReportedError(Exception):
    """Carries the exit code of an error that has been reported to the end of the process."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def run_step(
    step: str,
    schema: type[S],
    run: Callable[[S, Producer], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one step from its command line and return the exit code.

    Args:
        step: Step id, such as ``peft/megatron_bridge``.
        schema: Schema of the step's config.
        run: The step itself; gets the config, and the producer that its artifacts name.
        argv: Command line without the program; ``sys.argv`` by default.
    """
    parser = argparse.ArgumentParser(prog=step, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="resolved config of the step")
    arguments, others = parser.parse_known_args(argv)
    try:
        with _stopping_when_told(), reporting():
            _refuse_others(step, others)
            config = load_config(arguments.config, schema)
            digest = sha256_json(config.model_dump(mode="json"))
            version = nemotron.__version__
            run(config, Producer(step=step, config_sha256=digest, code_version=version))
    except _ReportedError as error:
        return error.exit_code
    except (PreemptedError, StopRequestedError) as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}; start it again to continue", flush=True)
        return int(ExitCode.PREEMPTED)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.OK)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Report what the block raises, before anything around the block is closed.

    Ranks that wait for this one fail as soon as its connections close. If the cause were reported
    any later, a consequence would be first, and only the first report is printed.
    """
    try:
        yield
    except (_ReportedError, PreemptedError):
        raise
    except NemotronError as error:
        raise _ReportedError(report(error)) from error
    except Exception as error:
        is_of_system = isinstance(error, OSError)
        if is_of_system and (refused := system_refusal(error, origin=origin(error))):
            raise _ReportedError(report(refused)) from error
        if _LOST_CONNECTION.search(f"{type(error).__name__} {error}"):
            time.sleep(_SECONDS_FOR_THE_CAUSE)
        code = report(_unexpected(error), details=traceback.format_exc())
        raise _ReportedError(code) from error


def step_error(step: str, name: str, problem: str, *, where: str = "") -> NemotronError:
    """Return the error ``name`` of a step's manifest, with its cause, recovery and exit code.

    Raises:
        KeyError: The manifest of ``step`` has no ``[[errors]]`` entry of that name.
    """
    manifest = tomllib.loads((STEPS_ROOT / step / "step.toml").read_text(encoding="utf-8"))
    entries = {entry["name"]: entry for entry in manifest["errors"]}
    entry = entries[name]
    return NemotronError(
        name,
        problem,
        where=where,
        why=entry["cause"],
        fix=entry["recovery"],
        exit_code=ExitCode(entry["exit_code"]),
    )


def report(error: NemotronError, details: str = "") -> int:
    """Print an error, once per job: only the first rank that fails prints."""
    rank = os.environ.get("RANK")
    record = error.to_dict() | {"rank": int(rank or 0)}
    if _claim_error_file(json.dumps(record)):
        prefix = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{details}{prefix}{error}", file=sys.stderr, flush=True)
    return int(error.exit_code)


def origin(error: BaseException) -> str:
    """Return the file and line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


@contextlib.contextmanager
def _stopping_when_told() -> Iterator[None]:
    """Raise ``StopRequestedError`` on a signal to stop, unless the step has ranks.

    Ranks agree on where to stop. Other steps can stop anywhere: as after a kill, what they have
    finished is complete on disk, and they clean up the rest.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:  # once: schedulers may repeat the signal while the step cleans up
            signal.signal(each, signal.SIG_IGN)
        raise StopRequestedError(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_others(step: str, others: Sequence[str]) -> None:
    if others:
        raise NemotronError(
            "argument_unknown",
            # Not their text: an argument may be a secret, and errors are recorded.
            f"{step} takes no arguments; got {len(others)}",
            where="after --",
            fix="pass config values as key=value before the --",
        )


def _unexpected(error: Exception) -> NemotronError:
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", []))
    return NemotronError(
        "unexpected",
        f"{type(error).__name__}: {error}{notes}",
        where=origin(error),
        fix="this is a bug in nemotron or its environment; report it with the lines above",
        exit_code=ExitCode.IO if isinstance(error, OSError) else ExitCode.FAILED,
    )


def _claim_error_file(text: str) -> bool:
    path = os.environ.get("NEMOTRON_ERROR_FILE")
    if not path:
        return True
    try:
        with Path(path).open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        return False
    except OSError:  # a full disk: the error is printed at least
        return True
    return True
