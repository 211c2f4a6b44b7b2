"""AdamW on a flat adapter whose lora_b may learn at another rate than its lora_a (LoRA+)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw

from nemotron.steps._training.flat_adapter import FlatAdapter


class LoraPlusAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` on ``adapter.values``, with ``lr * lora_plus_lr_ratio`` for lora_b.

    Weight decay follows the rate, as in two parameter groups of torch. The state is that of one
    parameter, whatever the ratio is: each moment one buffer laid out as ``adapter.values``.

    Source: Hayou et al. 2024 (arXiv:2402.12354), section 4; they recommend a ratio of 16.
    """

    def __init__(self, adapter: FlatAdapter, *, lora_plus_lr_ratio: float, **settings: Any) -> None:
        super().__init__([adapter.values], **settings)
        self._adapter = adapter
        self._lora_plus_lr_ratio = lora_plus_lr_ratio

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one optimizer step."""
        if self._lora_plus_lr_ratio == 1.0:
            return super().step(closure)
        values, gradients = self._adapter.values, self._adapter.gradients
        state, (group,) = self.state[values], self.param_groups
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(values) for name in ("exp_avg", "exp_avg_sq")}
        parts = self._adapter.parts
        for factor, ratio in (("lora_a", 1.0), ("lora_b", self._lora_plus_lr_ratio)):
            adamw(
                [values[part] for part in parts[factor]],
                [gradients[part] for part in parts[factor]],
                [state["exp_avg"][part] for part in parts[factor]],
                [state["exp_avg_sq"][part] for part in parts[factor]],
                [],
                [state["step"].clone() for _ in parts[factor]],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"] * ratio,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        state["step"] += 1.0
        return None
