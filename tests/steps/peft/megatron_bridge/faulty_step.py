"""The step, of which one rank goes wrong in its third iteration: ``FAULT --config FILE``.

Run by torchrun in the place of the step. The line of each fault is marked for the test.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch

from nemotron.steps._entry import run_step
from nemotron.steps._training.loop import Trainer
from nemotron.steps.peft.megatron_bridge import step
from nemotron.steps.peft.megatron_bridge.checks import STEP
from nemotron.steps.peft.megatron_bridge.schema import Config

ITERATION, RANK = 3, 1


def main() -> int:
    fault = FAULTS[sys.argv[1]]
    take = Trainer.step

    def faulty(self: Trainer, iteration: int, *, has_next: bool = False) -> None:
        if iteration == ITERATION and os.environ["RANK"] == str(RANK):
            fault(self)
        take(self, iteration, has_next=has_next)

    Trainer.step = faulty
    return run_step(STEP, Config, step.run, sys.argv[2:])


def raises(trainer: Trainer) -> None:
    raise ValueError("no such thing")  # line: raises


def exits(trainer: Trainer) -> None:
    sys.exit(0)  # line: exits


def vanishes(trainer: Trainer) -> None:
    time.sleep(1.5)  # line: vanishes, after a beat that tells so
    os._exit(0)


def is_killed(trainer: Trainer) -> None:
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    time.sleep(60)  # line: is_killed


def is_halted(trainer: Trainer) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    time.sleep(60)  # line: is_halted


def hangs(trainer: Trainer) -> None:
    threading.Event().wait()  # line: hangs


def has_nan(trainer: Trainer) -> None:
    trainer.adapter.gradients[0] = torch.nan
    trainer.adapter.zero_gradients = lambda: None  # what would take it away again


def drifts(trainer: Trainer) -> None:
    trainer.adapter.values.data[0] += 0.25


FAULTS: dict[str, Callable[[Trainer], None]] = {
    each.__name__: each
    for each in (raises, exits, vanishes, is_killed, is_halted, hangs, has_nan, drifts)
}

if __name__ == "__main__":
    raise SystemExit(main())
