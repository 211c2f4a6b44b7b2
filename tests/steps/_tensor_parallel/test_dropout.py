"""nemotron.steps._tensor_parallel.dropout: what a mask is, whatever rank draws it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.dropout import DropoutRows

ROWS = DropoutRows(keys=["1/1/0", "1/1/1"], num_tokens=[300, 200])
FEATURES, EVERYTHING = 64, slice(None)


def mask(p: float, name: str = "a", columns: slice = EVERYTHING) -> Tensor:
    x_SF = torch.empty(500, FEATURES)
    return ROWS.mask(x_SF, name=name, features=FEATURES, tokens=EVERYTHING, columns=columns, p=p)


@pytest.mark.parametrize("p", [0.1, 0.75])
def test_a_mask_drops_with_its_probability_and_keeps_the_mean(p: float) -> None:
    drawn = mask(p)
    kept = drawn[drawn != 0.0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1.0 / (1.0 - p)))
    # 32000 draws: five standard deviations are at most 0.014.
    assert 1.0 - len(kept) / drawn.numel() == pytest.approx(p, abs=0.014)


def test_rows_and_linears_have_masks_of_their_own() -> None:
    drawn = mask(0.5)
    assert not torch.equal(drawn[:200], drawn[300:])
    assert not torch.equal(drawn, mask(0.5, name="b"))
    assert torch.equal(drawn[:, 16:32], mask(0.5, columns=slice(16, 32)))
