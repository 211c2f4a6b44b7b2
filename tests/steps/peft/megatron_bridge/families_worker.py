"""Runs the training step once per config given, in the same ranks: starting ranks is what costs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from nemotron.artifacts import Producer
from nemotron.config import load_config
from nemotron.steps.peft.megatron_bridge.schema import Config
from nemotron.steps.peft.megatron_bridge.step import run

PRODUCER = Producer(step="test", config_sha256="0" * 64, code_version="0")


def main() -> None:
    *configs, ports, report = sys.argv[1:]
    # Each run meets at a store of its own: keys of the one before would be found in one.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for config, port in zip(configs, ports.split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        run(load_config(Path(config), Config), PRODUCER)
    if os.environ["RANK"] == "0":
        Path(report).write_text(json.dumps({"runs": len(configs)}), encoding="utf-8")


if __name__ == "__main__":
    main()
