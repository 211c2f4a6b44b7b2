"""The learning rate of every iteration, as Megatron's OptimizerParamScheduler computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WsdStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from ``warmup_init`` to ``lr``, then the decay style down to ``min_lr``.

    Args:
        lr: Learning rate after the warm-up.
        min_lr: Learning rate after ``decay_iters``, and never less before it.
        warmup_iters: Iterations of the warm-up, less than ``decay_iters``; a fraction of an
            iteration counts. ``inverse-square-root`` needs one.
        decay_iters: Iteration at which the decay ends, warm-up included.
        style: Shape of the decay. ``WSD`` (warm-up, stable, decay) keeps ``lr`` until
            ``wsd_decay_iters`` before the end.
        warmup_init: Learning rate of the first iteration of a warm-up.
        wsd_decay_iters: Iterations of the decay of ``WSD``.
        wsd_style: Shape of the decay of ``WSD``.
    """

    lr: float
    min_lr: float
    warmup_iters: float
    decay_iters: int
    style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
    warmup_init: float = 0.0
    wsd_decay_iters: int = 0
    wsd_style: WsdStyle = "exponential"

    def at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0.

        The first one of a warm-up has ``warmup_init``: Megatron reads its schedule before it
        advances it.
        """
        if self.warmup_iters and iteration <= self.warmup_iters:
            return self.warmup_init + (self.lr - self.warmup_init) * iteration / self.warmup_iters
        if self.style == "constant":
            return self.lr
        if iteration > self.decay_iters:
            return self.min_lr
        if self.style == "inverse-square-root":
            return max(self.min_lr, self.lr * math.sqrt(self.warmup_iters / iteration))
        return self.min_lr + (self.lr - self.min_lr) * self._kept(iteration)

    def _kept(self, iteration: int) -> float:
        """Return which part of ``lr - min_lr`` is left."""
        if self.style == "WSD":
            done = iteration - (self.decay_iters - self.wsd_decay_iters)
            return _kept(self.wsd_style, done / self.wsd_decay_iters) if done > 0 else 1.0
        done = (iteration - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        return _kept("linear" if self.style == "linear" else "cosine", done)


def _kept(style: WsdStyle, done: float) -> float:
    """Return what is left of 1 after ``done``, in [0, 1], of a decay to 0."""
    if style == "linear":
        return 1.0 - done
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - math.sqrt(done) if style == "minus_sqrt" else 2.0 * 0.5**done - 1.0
