"""Train with a save at every step, killed at random again and again; what was saved stays.

    python kill_saves.py --config train.yaml --kills 150

Each life is a fork of this process, which has imported everything, so that much of it is spent in
saves; how many kills lay in one is printed. Exits 0 if after every kill the newest save that the
run had reported, or a newer one, was whole, and no save that is there was not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path

import yaml

from nemotron.steps._entry import run_step
from nemotron.steps._training.resume import list_saves, verify_save
from nemotron.steps.peft.megatron_bridge import step
from nemotron.steps.peft.megatron_bridge.checks import STEP
from nemotron.steps.peft.megatron_bridge.schema import Config

LONGEST_SECONDS = 1.0  # of a life after its first save: several steps, each with a save


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, required=True)
    arguments = parser.parse_args()
    output = Path(yaml.safe_load(arguments.config.read_text())["checkpoint"]["save"])
    moments, newest, num_within = random.Random(0), 0, 0
    for _ in range(arguments.kills):
        if not live_until(arguments.config, output, moments.uniform(0.0, LONGEST_SECONDS)):
            return 1
        newest = check(output)
        num_within += any(output.glob(".iter_*.partial"))
    print(f"{arguments.kills} kills, {num_within} within saves, 0 lost, {newest} iterations")
    return 0


def live_until(config: Path, output: Path, seconds: float) -> bool:
    """Train in a fork until some time after its first save; return whether it was killed."""
    before = max(reported(output), default=0)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run_step(STEP, Config, step.run, ["--config", str(config)]))
    while max(reported(output), default=0) <= before:
        if os.waitpid(child, os.WNOHANG)[0]:
            print("the run ended by itself")
            return False
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def reported(output: Path) -> list[int]:
    """Return the iterations that the run has reported as saved."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event["iteration"] for event in events if event["event"] == "saved"]


def check(output: Path) -> int:
    saves = list(list_saves(output))
    for _, directory in saves:
        verify_save(directory)
    newest = saves[0][0]
    assert newest >= max(reported(output)), "a save that was reported is lost"
    tracker = int((output / "latest_checkpointed_iteration.txt").read_text())
    assert tracker in (newest, newest - 1), "the tracker is ahead of the saves"
    return newest


if __name__ == "__main__":
    raise SystemExit(main())
