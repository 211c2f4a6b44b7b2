"""Ranks of test_adamw.py: the flat optimizer against AdamW with two groups on whole factors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
)
from nemotron.steps._training.adamw import FlatAdamW
from nemotron.steps._training.distributed import make_layout
from nemotron.steps._training.flat_adapter import FlatAdapter

TOKENS, HIDDEN, FEATURES, LORA_DIM, NUM_STEPS = 6, 8, 12, 3, 5
LEARNING_RATE = 1e-2
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
Shape = tuple[int, int]


def main() -> None:
    dist.init_process_group("gloo")
    group = ProcessGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    report = {str(ratio): difference(group, ratio) for ratio in (1.0, 16.0)}
    if group.rank == 0:
        Path(sys.argv[-1]).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def random(shape: Shape, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def difference(group: ProcessGroup, ratio: float) -> float:
    """Return the largest difference of a factor from the reference's, over all steps."""
    weights = random((FEATURES, HIDDEN), 1), random((HIDDEN, FEATURES), 2)
    factors = [
        random(shape, 3 + index)
        for index, shape in enumerate(
            [(LORA_DIM, HIDDEN), (FEATURES, LORA_DIM), (LORA_DIM, FEATURES), (HIDDEN, LORA_DIM)]
        )
    ]
    column, row = model(group, weights, factors)
    adapter = FlatAdapter(
        [*column.lora_parameters(), *row.lora_parameters()],
        make_layout(group.size, group.size, torch.device("cpu")),
    )
    optimizer = FlatAdamW(adapter, lora_plus_lr_ratio=ratio, **SETTINGS)
    wanted = [factor.clone().requires_grad_() for factor in factors]
    groups = [
        {"params": wanted[0::2], "lr": LEARNING_RATE},
        {"params": wanted[1::2], "lr": LEARNING_RATE * ratio},
    ]
    reference = torch.optim.AdamW(groups, **SETTINGS)
    largest = 0.0
    for step in range(NUM_STEPS):
        x = random((TOKENS, HIDDEN), 10 + step)
        adapter.zero_gradients()
        row(column(x)[0]).square().sum().backward()
        adapter.reduce_gradients()
        optimizer.step(LEARNING_RATE)
        reference.zero_grad()
        hidden = whole(x, weights[0], *wanted[:2])
        whole(hidden, weights[1], *wanted[2:]).square().sum().backward()
        reference.step()
        got = [
            factor
            for linear in (column, row)
            for factor in linear.gather_lora(linear.lora_a.detach(), linear.lora_b.detach())
        ]
        for one, other in zip(got, wanted, strict=True):
            largest = max(largest, float((one - other).abs().max()))
    return largest


def model(
    group: ProcessGroup, weights: tuple[Tensor, Tensor], factors: list[Tensor]
) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    spec = LoraSpec(LORA_DIM, 6.0)
    column = ColumnParallelLinear(
        "column", HIDDEN, FEATURES, lora=spec, group=group, dtype=torch.float64
    )
    row = RowParallelLinear("row", FEATURES, HIDDEN, lora=spec, group=group, dtype=torch.float64)
    column.load_weight(torch.cat([weights[0][rows] for rows in column.local_rows()]))
    row.load_weight(weights[1][:, row.local_columns()])
    column.load_lora(*factors[:2])
    row.load_lora(*factors[2:])
    return column, row


def whole(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return x @ weight.T + 2.0 * (x @ lora_a.T) @ lora_b.T


if __name__ == "__main__":
    main()
