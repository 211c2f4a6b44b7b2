"""Dropout masks on the LoRA input that do not depend on the parallel layout.

A mask is a function of (seed, iteration, row of the global batch, name of the linear, token,
feature), never of the ambient generator: every rank draws the mask of the whole feature dimension
for the rows it holds and takes its own columns. A sharded input thus costs T times the random
numbers, and the same run at another T, PP or DP drops the same activations.

S tokens of a micro batch, F features, T tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.keyed_generator import keyed_generator


@dataclass(frozen=True)
class DropoutRows:
    """What identifies the rows of one micro batch: one key and one token count a row."""

    keys: Sequence[str]
    num_tokens: Sequence[int]

    def mask(
        self, x_SF: Tensor, *, name: str, features: int, tokens: slice, columns: slice, p: float
    ) -> Tensor:
        """Return the factors for ``x_SF``: 0 with probability ``p``, else 1.

        That the mean be kept is left to the scale of the product: 1 / (1 - p) is no number of bf16.

        Args:
            x_SF: The input, this rank's tokens and columns of it; gives dtype and device.
            name: Name of the linear.
            features: F, all features of the input.
            tokens: This rank's part of the tokens.
            columns: This rank's part of the features.
            p: Probability of a drop, in [0, 1).
        """
        masks = []
        for key, num_tokens in zip(self.keys, self.num_tokens, strict=True):
            generator = keyed_generator(f"{key}/{name}", x_SF.device)
            uniform = torch.rand((num_tokens, features), generator=generator, device=x_SF.device)
            masks.append(uniform[:, columns] >= p)
        return torch.cat(masks)[tokens].to(x_SF.dtype)
