"""nemotron.steps._tensor_parallel.linear: how weights lie; test_core.py is about their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemotron.steps._tensor_parallel import fused
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
)


@pytest.mark.parametrize("lora_dim", [1, 3, 8, 12])
def test_every_row_of_a_product_begins_at_16_bytes_at_any_rank(
    monkeypatch: pytest.MonkeyPatch, lora_dim: int
) -> None:
    # As a GPU's fast products of bf16 want it.
    sent: list[torch.Tensor] = []

    def empty_to_send(*arguments: Any) -> torch.Tensor:
        sent.append(empty(*arguments))
        return sent[-1]

    empty = fused.empty_to_send
    monkeypatch.setattr(fused, "empty_to_send", empty_to_send)
    dtype = torch.bfloat16
    split: Any = {"lora": LoraSpec(lora_dim, 8.0), "group": ProcessGroup(), "dtype": dtype}
    column = ColumnParallelLinear("column", 16, 24, **split)
    row = RowParallelLinear("row", 24, 16, **split)
    for linear in (column, row):
        torch.nn.init.normal_(linear.extended)
    x = torch.ones(5, 16, dtype=dtype, requires_grad=True)
    row(column(x)[0]).sum().backward()
    assert len(sent) == 3
    for each in (column.extended, row.extended, *sent):
        assert each.stride(0) * each.itemsize % 16 == 0
    for linear in (column, row):
        assert linear.lora_a.grad is not None
        assert linear.lora_a.grad.shape == linear.lora_a.shape
