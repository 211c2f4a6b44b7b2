"""The learning rate of every iteration, as Megatron's OptimizerParamScheduler computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to ``lr``, then the decay style down to ``min_lr``.

    Args:
        lr: Learning rate after the warm-up.
        min_lr: Learning rate at and after ``decay_iters``.
        warmup_iters: Iterations of the warm-up, less than ``decay_iters``.
        decay_iters: Iteration at which the decay ends, warm-up included.
        style: Shape of the decay.
    """

    lr: float
    min_lr: float
    warmup_iters: int
    decay_iters: int
    style: Literal["constant", "linear", "cosine"]

    def at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0.

        The first iteration of a warm-up has 0: Megatron reads its schedule before it advances it.
        """
        if self.warmup_iters and iteration <= self.warmup_iters:
            return self.lr * iteration / self.warmup_iters
        if self.style == "constant":
            return self.lr
        if iteration > self.decay_iters:
            return self.min_lr
        done = (iteration - self.warmup_iters) / max(1, self.decay_iters - self.warmup_iters)
        kept = 1.0 - done if self.style == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.min_lr + (self.lr - self.min_lr) * kept
