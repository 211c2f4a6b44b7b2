"""Runs a conversion again and again and kills it with SIGKILL at random moments.

    python tests/steps/convert/kill_conversions.py hf_to_megatron=CONFIG.json --kills 20

The files are made small, so that a small model has many. Checked are: nothing is under the final
name before it is complete, what was finished before a kill is not written again, and in the end
every byte is that of a run that was left alone, with nothing beside it. A run that ended before its
kill does not count.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from nemotron.artifacts import RESUME_DIR, Producer, blake3_file
from nemotron.config import Schema
from nemotron.steps._formats import huggingface_writer, megatron_writer


def start(step: str, config: Schema) -> int:
    """Start a conversion in a fork, which has no imports to pay for; return its process id."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (ends with os._exit)
        code = 1
        try:
            run = import_module(f"nemotron.steps.convert.{step}.step").run
            run(config, Producer(step=f"convert/{step}", config_sha256="0", code_version="0"))
            code = 0
        finally:
            os._exit(code)
    return child


def finish(step: str, config: Any) -> dict[str, str]:
    """Run to the end; return every file of the output with its digest."""
    if os.waitpid(start(step, config), 0)[1]:
        raise SystemExit("a run that was left alone failed")
    output: Path = config.output_dir
    beside = {path.name for path in output.parent.glob(f".{output.name}.*")}
    if beside - {f".{output.name}.lock"}:
        raise SystemExit(f"left over: {beside}")
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    """Return every file of a directory with its digest."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): blake3_file(path) for path in files}


def finished_files(partial: Path) -> dict[str, tuple[int, int]]:
    """Return the files that have a receipt, each with its inode and the time of its last change."""
    names = {path.stem for path in (partial / RESUME_DIR).glob("*.json")}
    states = {path.name: path.stat() for path in partial.rglob("*") if path.name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def kill(step: str, path: Path, *, num_kills: int, rng: random.Random) -> None:
    """Kill a conversion as often as asked, then let it end, and compare."""
    schema = import_module(f"nemotron.steps.convert.{step}.schema").Config
    import_module(f"nemotron.steps.convert.{step}.step")  # once, before the forks
    config = schema.model_validate_json(path.read_bytes())
    output: Path = config.output_dir
    partial = output.with_name(f".{output.name}.partial")
    begin = time.monotonic()
    wanted = finish(step, config)
    longest = time.monotonic() - begin
    shutil.rmtree(output)
    kills = kept = 0
    before: dict[str, tuple[int, int]] = {}
    while kills < num_kills:
        child = start(step, config)
        time.sleep(rng.uniform(0.0, 0.8 * longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if output.exists():
            if digests(output) != wanted:
                raise SystemExit("it had its name before it was complete")
            shutil.rmtree(output)
            before = {}
            continue
        kills += 1
        after = finished_files(partial)
        if not before.items() <= after.items():
            raise SystemExit(f"written again: {before.items() - after.items()}")
        kept += len(before)
        before = after
    if (got := finish(step, config)) != wanted:
        raise SystemExit(f"other files: {got.items() ^ wanted.items()}")
    print(f"{step}: {kills} kills, {kept} times a finished file was found and kept")


def main() -> None:
    """Kill each of the conversions that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("conversions", nargs="+", metavar="STEP=CONFIG.json")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file-bytes", type=int, default=2_000)
    arguments = parser.parse_args()
    huggingface_writer.MAX_SHARD_BYTES = megatron_writer.MAX_FILE_BYTES = arguments.max_file_bytes
    rng = random.Random(arguments.seed)
    for conversion in arguments.conversions:
        step, _, path = conversion.partition("=")
        kill(step, Path(path), num_kills=arguments.kills, rng=rng)


if __name__ == "__main__":
    main()
