"""Runs the packing step again and again and kills it with SIGKILL at random moments.

    python tests/steps/data_prep/sft_packing/kill_packing.py CONFIG.json --kills 20

Ends with a run that is left alone; whoever calls this compares what it wrote. A run that ended
before its kill does not count: its output is removed, and mostly the work beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from nemotron.artifacts import Producer
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.step import run


def start(config: Config) -> int:
    """Start a run in a fork, which has no imports to pay for; return its process id."""
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (the process ends with os._exit)
        code = 1
        try:
            run(config, Producer(step="data_prep/sft_packing", config_sha256="0", code_version="0"))
            code = 0
        finally:
            os._exit(code)
    return child


def main() -> None:
    """Kill as often as asked, then run to the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = Config.model_validate_json(arguments.config.read_bytes())
    output = config.output_dir
    rng = random.Random(arguments.seed)
    begin = time.monotonic()
    if os.waitpid(start(config), 0)[1]:
        raise SystemExit("a run that was left alone failed")
    longest = time.monotonic() - begin
    kills = 0
    while kills < arguments.kills:
        if output.is_dir():
            shutil.rmtree(output)
            if rng.random() < 0.8:
                shutil.rmtree(output.with_name(f".{output.name}.work"), ignore_errors=True)
        child = start(config)
        time.sleep(rng.uniform(0.0, 0.8 * longest))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    if os.waitpid(start(config), 0)[1]:
        raise SystemExit("the run after the kills failed")
    print(f"{kills} kills")


if __name__ == "__main__":
    main()
