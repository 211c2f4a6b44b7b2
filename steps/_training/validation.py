"""The results of evaluations on the valid split, as saves keep them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Validation:
    """Mean loss per supervised token of the valid split, and the number of these tokens."""

    lm_loss: float
    supervised_tokens: int


@dataclass(frozen=True)
class Best:
    """The lowest loss on the valid split so far, and after how many steps; 0 is the base alone.

    Losses are comparable only over the same rows. Where ``supervised_tokens`` differs, as with
    another ``eval_iters``, the search for the best starts over.
    """

    iteration: int
    lm_loss: float
    supervised_tokens: int

    def is_beaten_by(self, result: Validation) -> bool:
        """Return whether an evaluation is better than this one, or was made on other rows."""
        is_other = result.supervised_tokens != self.supervised_tokens
        return is_other or result.lm_loss < self.lm_loss
