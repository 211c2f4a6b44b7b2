"""AdamW on a flat adapter whose lora_b may learn at another rate than its lora_a (LoRA+)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nemotron.steps._training.flat_adapter import FlatAdapter


class FlatAdamW:
    """torch's AdamW on ``adapter.values``; lora_b learns ``lora_plus_lr_ratio`` times as fast.

    Weight decay scales with the rate, as with two parameter groups of torch. The state does not
    depend on the ratio. torch's function is called directly: ``torch.optim.Optimizer`` imports
    torch's compiler for its first parameter group, which takes half a second of every start.

    Sources: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; LoRA+, Hayou et al. 2024
    (arXiv:2402.12354), section 4; they recommend a ratio of 16.

    Attributes:
        moments: ``exp_avg`` and ``exp_avg_sq``, laid out as ``adapter.values``.
        num_steps: Steps taken.
    """

    def __init__(
        self,
        adapter: FlatAdapter,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        lora_plus_lr_ratio: float,
    ) -> None:
        self._adapter, self._betas, self._eps = adapter, betas, eps
        self._weight_decay, self._lora_plus_lr_ratio = weight_decay, lora_plus_lr_ratio
        self.moments: dict[str, Tensor] = {
            name: torch.zeros_like(adapter.gradients) for name in ("exp_avg", "exp_avg_sq")
        }
        self.num_steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step at this learning rate."""
        if self._lora_plus_lr_ratio == 1.0:
            self._update([slice(None)], lr)
        else:
            self._update(self._adapter.parts["lora_a"], lr)
            self._update(self._adapter.parts["lora_b"], lr * self._lora_plus_lr_ratio)
        self.num_steps += 1

    def _update(self, parts: list[slice], lr: float) -> None:
        adapter, moments = self._adapter, self.moments
        adamw(
            [adapter.values[part] for part in parts],
            [adapter.gradients[part] for part in parts],
            [moments["exp_avg"][part] for part in parts],
            [moments["exp_avg_sq"][part] for part in parts],
            [],
            [torch.tensor(float(self.num_steps)) for _ in parts],
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=self._weight_decay,
            eps=self._eps,
            maximize=False,
        )
