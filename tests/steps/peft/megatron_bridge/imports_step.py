"""The step, which says at its end what it has imported that takes long: ``--config FILE``.

Run by torchrun in the place of the step.
"""

from __future__ import annotations

import sys

from nemotron.steps._entry import run_step
from nemotron.steps.peft.megatron_bridge import step
from nemotron.steps.peft.megatron_bridge.checks import STEP
from nemotron.steps.peft.megatron_bridge.schema import Config

SLOW = ("sympy", "torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "transformers")

if __name__ == "__main__":
    code = run_step(STEP, Config, step.run, sys.argv[1:])
    found = [name for name in SLOW if name in sys.modules]
    print(f"imported {found}", file=sys.stderr)
    sys.exit(code)
