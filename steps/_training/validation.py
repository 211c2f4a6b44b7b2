"""What an evaluation on the valid split found, as it is kept in saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Validation:
    """Mean loss per supervised token of the valid split, and over how many tokens."""

    lm_loss: float
    supervised_tokens: int


@dataclass(frozen=True)
class Best:
    """The lowest loss on the valid split so far, and after how many steps; 0 is the base alone.

    Losses compare over the same rows: with another ``eval_iters``, or number of
    ``supervised_tokens`` for that, the search begins anew.
    """

    iteration: int
    lm_loss: float
    supervised_tokens: int

    def is_beaten_by(self, result: Validation) -> bool:
        """Return whether an evaluation is better, or one of other rows."""
        is_other = result.supervised_tokens != self.supervised_tokens
        return is_other or result.lm_loss < self.lm_loss
