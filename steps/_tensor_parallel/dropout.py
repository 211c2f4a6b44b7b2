"""Dropout masks on the LoRA input that do not depend on the parallel layout.

A mask is a function of (seed, iteration, row of the global batch, name of the linear, token,
feature), and never of torch's global generator: every rank draws the mask of all features for the
rows it holds and takes its own columns. So the same run at another T, PP or DP drops the same
activations, at the price of T times as many random numbers for a sharded input.

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
    """The identity of the rows of a micro batch: a key and a token count for each row."""

    keys: Sequence[str]
    num_tokens: Sequence[int]

    def mask(
        self, x_SF: Tensor, *, name: str, features: int, tokens: slice, columns: slice, p: float
    ) -> Tensor:
        """Return the factors for ``x_SF``: 0 with probability ``p``, else 1.

        The mean is restored by the product's scale, because bf16 could not represent 1 / (1 - p).

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
