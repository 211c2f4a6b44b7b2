"""nemotron.steps._tensor_parallel.dropout: what a mask is, whatever rank draws it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.dropout import DropoutRows
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
)

ROWS = DropoutRows(keys=["1/1/0", "1/1/1"], num_tokens=[300, 200])
FEATURES, EVERYTHING = 64, slice(None)


def mask(p: float, name: str = "a", columns: slice = EVERYTHING) -> Tensor:
    x_SF = torch.empty(500, FEATURES)
    return ROWS.mask(x_SF, name=name, features=FEATURES, tokens=EVERYTHING, columns=columns, p=p)


@pytest.mark.parametrize("p", [0.1, 0.75])
def test_a_mask_drops_with_its_probability(p: float) -> None:
    drawn = mask(p)
    kept = drawn[drawn != 0.0]
    assert torch.equal(kept, torch.ones_like(kept))
    # 32000 draws: five standard deviations are at most 0.014.
    assert 1.0 - len(kept) / drawn.numel() == pytest.approx(p, abs=0.014)


def test_rows_and_linears_have_masks_of_their_own() -> None:
    drawn = mask(0.5)
    assert not torch.equal(drawn[:200], drawn[300:])
    assert not torch.equal(drawn, mask(0.5, name="b"))
    assert torch.equal(drawn[:, 16:32], mask(0.5, columns=slice(16, 32)))


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_what_is_kept_is_scaled_up_as_exactly_in_bf16(
    kind: type[ColumnParallelLinear | RowParallelLinear],
) -> None:
    p, features = 0.05, 512
    lora = LoraSpec(8, 16.0, dropout=p)
    linear = kind("a", FEATURES, features, lora=lora, group=ProcessGroup(), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    lora_a = torch.randn(8, FEATURES, generator=generator).bfloat16()
    lora_b = torch.randn(features, 8, generator=generator).bfloat16()
    linear.load_weight(torch.zeros(features, FEATURES))
    linear.load_lora(lora_a, lora_b)
    x_SH = torch.randn(500, FEATURES, generator=generator).bfloat16()
    out = linear(x_SH, ROWS)
    y_SF = out[0] if isinstance(out, tuple) else out
    dy_SF = torch.randn(y_SF.shape, generator=generator).bfloat16()
    y_SF.backward(dy_SF)

    scale, a, b = 2.0 / (1.0 - p), lora_a.double(), lora_b.double()
    dropped_SH, dy = x_SH.double() * (mask(p) != 0.0), dy_SF.double()
    for got, wanted in (
        (y_SF.detach(), scale * dropped_SH @ a.T @ b.T),
        (linear.lora_a.grad, scale * (dy @ b).T @ dropped_SH),
        (linear.lora_b.grad, scale * dy.T @ (dropped_SH @ a.T)),
    ):
        assert got is not None
        # A rounding to 8 bits is as often up as down: over 512 values and more it is none.
        assert float((got.double() * wanted).sum() / wanted.square().sum()) == pytest.approx(
            1.0, abs=3e-4
        )
