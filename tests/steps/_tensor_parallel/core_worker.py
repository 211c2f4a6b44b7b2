"""Ranks of test_core.py: the core against one unsharded model, in float64; figures go to a report.

Every figure is a largest difference over all ranks, relative to the reference's largest value, or a
count of collectives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemotron.steps._tensor_parallel import collectives
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.dropout import DropoutRows
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
)
from nemotron.steps._tensor_parallel.vocabulary import (
    VocabParallelEmbedding,
    linear_cross_entropy,
    vocabulary_rows,
)

TOKENS, HIDDEN, FEATURES, LORA_DIM, VOCABULARY = 12, 8, 16, 3, 33
ROWS = DropoutRows(keys=["1/1/0", "1/1/1"], num_tokens=[5, 7])
ONE = ProcessGroup()
REPORT: dict[str, float] = {}


def main() -> None:
    dist.init_process_group("gloo")
    group = ProcessGroup(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    for sequence_parallel in (False, True):
        for dropout in (0.0, 0.5):
            check_column(group, dropout, sequence_parallel)
            check_row(group, dropout, sequence_parallel)
        check_collectives(group, sequence_parallel)
    check_vocabulary(group)
    check_initialisation(group)
    if group.rank == 0:
        Path(sys.argv[-1]).write_text(json.dumps(REPORT), encoding="utf-8")
    dist.destroy_process_group()


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole_factors(linear: ColumnParallelLinear | RowParallelLinear) -> tuple[Tensor, Tensor]:
    return linear.gather_lora(linear.lora_a.detach(), linear.lora_b.detach())


def record(name: str, got: Tensor, wanted: Tensor) -> None:
    """Report the largest relative difference over the ranks."""
    difference = (got - wanted).detach().abs().max() / wanted.detach().abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    REPORT[name] = float(difference)


def column(
    group: ProcessGroup, dropout: float, sequence_parallel: bool = False
) -> ColumnParallelLinear:
    spec = LoraSpec(LORA_DIM, 6.0, dropout)
    linear = ColumnParallelLinear(
        "column",
        HIDDEN,
        FEATURES,
        num_segments=2,
        lora=spec,
        group=group,
        dtype=torch.float64,
        sequence_parallel=sequence_parallel,
    )
    weight = random(FEATURES, HIDDEN, seed=1)
    linear.load_weight(torch.cat([weight[rows] for rows in linear.local_rows()]))
    linear.load_lora(random(LORA_DIM, HIDDEN, seed=2), random(FEATURES, LORA_DIM, seed=3))
    return linear


def row(group: ProcessGroup, dropout: float, sequence_parallel: bool = False) -> RowParallelLinear:
    spec = LoraSpec(LORA_DIM, 6.0, dropout)
    linear = RowParallelLinear(
        "row",
        FEATURES,
        HIDDEN,
        lora=spec,
        group=group,
        dtype=torch.float64,
        sequence_parallel=sequence_parallel,
    )
    linear.load_weight(random(HIDDEN, FEATURES, seed=4)[:, linear.local_columns()])
    linear.load_lora(random(LORA_DIM, FEATURES, seed=5), random(HIDDEN, LORA_DIM, seed=6))
    return linear


def reference(x: Tensor, linear: ColumnParallelLinear | RowParallelLinear) -> Tensor:
    """Return what plain autograd makes of the whole matrices, with the same dropout mask."""
    assert linear.lora is not None
    spec, dropped = linear.lora, x
    if spec.dropout:
        mask = ROWS.mask(
            x,
            name=linear.name,
            features=x.shape[1],
            tokens=slice(0, len(x)),
            columns=slice(0, x.shape[1]),
            p=spec.dropout,
        )
        dropped = x * mask / (1.0 - spec.dropout)
    update = (dropped @ linear.lora_a.T) @ linear.lora_b.T
    return x @ linear.weight.T + spec.alpha / spec.dim * update


def own_tokens(group: ProcessGroup, sequence_parallel: bool) -> slice:
    """Return the rows of the sequence that this rank holds between the linears."""
    part = TOKENS // group.size
    return slice(group.rank * part, (group.rank + 1) * part) if sequence_parallel else slice(TOKENS)


def label(linear: str, dropout: float, sequence_parallel: bool) -> str:
    return f"{linear} sp={sequence_parallel} dropout={dropout}"


def check_column(group: ProcessGroup, dropout: float, sequence_parallel: bool) -> None:
    sharded, whole = column(group, dropout, sequence_parallel), column(ONE, dropout)
    name, tokens = label("column", dropout, sequence_parallel), own_tokens(group, sequence_parallel)
    rows = torch.cat([torch.arange(FEATURES)[part] for part in sharded.local_rows()])
    dy, dresidual = random(TOKENS, FEATURES, seed=8), random(TOKENS, HIDDEN, seed=15)
    x_whole = random(TOKENS, HIDDEN, seed=7).requires_grad_()
    x = x_whole.detach()[tokens].clone().requires_grad_()
    y_whole = reference(x_whole, whole)
    torch.autograd.backward([y_whole, x_whole], [dy, dresidual])
    y, residual = sharded(x, ROWS if dropout else None)
    torch.autograd.backward([y, residual], [dy[:, rows], dresidual[tokens]])
    record(f"{name} residual", residual, x_whole[tokens])
    record(f"{name} y", y, y_whole[:, rows])
    record(f"{name} dx", gradient(x), gradient(x_whole)[tokens])
    record(f"{name} dA", summed(gradient(sharded.lora_a)), gradient(whole.lora_a))
    record(f"{name} dB", gradient(sharded.lora_b), gradient(whole.lora_b)[rows])
    for factor, got, wanted in zip("AB", whole_factors(sharded), whole_factors(whole), strict=True):
        record(f"{name} gathered {factor}", got, wanted)


def check_row(group: ProcessGroup, dropout: float, sequence_parallel: bool) -> None:
    sharded, whole = row(group, dropout, sequence_parallel), row(ONE, dropout)
    name, tokens = label("row", dropout, sequence_parallel), own_tokens(group, sequence_parallel)
    columns = sharded.local_columns()
    dy = random(TOKENS, HIDDEN, seed=9)
    x_whole = random(TOKENS, FEATURES, seed=10).requires_grad_()
    x = x_whole.detach()[:, columns].contiguous().requires_grad_()
    y_whole = reference(x_whole, whole)
    y_whole.backward(dy)
    y = sharded(x, ROWS if dropout else None)
    y.backward(dy[tokens])
    record(f"{name} y", y, y_whole[tokens])
    record(f"{name} dx", gradient(x), gradient(x_whole)[:, columns])
    record(f"{name} dA", gradient(sharded.lora_a), gradient(whole.lora_a)[:, columns])
    db = gradient(sharded.lora_b)
    record(f"{name} dB", summed(db) if sequence_parallel else db, gradient(whole.lora_b))
    if not sequence_parallel:
        replicas = collectives.all_gather(db, group)
        REPORT[f"{name} between ranks"] = float((replicas - replicas[0]).abs().max())
    for factor, got, wanted in zip("AB", whole_factors(sharded), whole_factors(whole), strict=True):
        record(f"{name} gathered {factor}", got, wanted)


def summed(partial: Tensor) -> Tensor:
    """Return the sum over the ranks of a gradient that each holds a part of."""
    total = partial.clone()
    dist.all_reduce(total)
    return total


def check_vocabulary(group: ProcessGroup) -> None:
    """The vocabulary, 33, is divisible by no number of ranks here."""
    table = random(VOCABULARY, HIDDEN, seed=11)
    tokens = torch.arange(VOCABULARY).flip(0)
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, group=group, dtype=torch.float64)
    embedding.weight.copy_(table[embedding.rows])
    record("embedding", embedding(tokens), table[tokens])
    x, x_whole = (random(TOKENS, HIDDEN, seed=12).requires_grad_() for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    weights = random(TOKENS, seed=13)
    loss_whole = F.cross_entropy(x_whole @ table.T, labels, reduction="none")
    (loss_whole * weights).sum().backward()
    shard = table[vocabulary_rows(VOCABULARY, group)]
    loss = linear_cross_entropy(x, shard, labels, vocab_size=VOCABULARY, group=group)
    (loss * weights).sum().backward()
    record("cross entropy loss", loss, loss_whole)
    record("cross entropy dx", gradient(x), gradient(x_whole))


def check_initialisation(group: ProcessGroup) -> None:
    for make in (lambda g: column(g, 0.0), lambda g: row(g, 0.0)):
        sharded, whole = make(group), make(ONE)
        for linear in (sharded, whole):
            linear.init_lora(seed=7)
        for factor, got, wanted in zip(
            "AB", whole_factors(sharded), whole_factors(whole), strict=True
        ):
            difference = (got - wanted).abs().max()
            dist.all_reduce(difference, op=dist.ReduceOp.MAX)
            REPORT[f"init {sharded.name} {factor}"] = float(difference)


def check_collectives(group: ProcessGroup, sequence_parallel: bool) -> None:
    linears = (column(group, 0.0, sequence_parallel), row(group, 0.0, sequence_parallel))
    tokens = own_tokens(group, sequence_parallel)
    inputs = (
        random(TOKENS, HIDDEN, seed=14)[tokens],
        random(TOKENS, FEATURES // group.size, seed=14),
    )
    for linear, x in zip(linears, inputs, strict=True):
        for needs_dx in (True, False):
            leaf = x.clone().requires_grad_(needs_dx)
            y: list[Tensor] = []
            place = f"{linear.name} sp={sequence_parallel} dx={needs_dx}"
            REPORT[f"forward {place}"] = count(lambda: y.append(output(linear, leaf)))  # noqa: B023
            REPORT[f"backward {place}"] = count(lambda: y[0].sum().backward())  # noqa: B023


def output(linear: ColumnParallelLinear | RowParallelLinear, x: Tensor) -> Tensor:
    return linear(x)[0] if isinstance(linear, ColumnParallelLinear) else linear(x)


def count(run: Callable[[], None]) -> int:
    """Return how many collectives of any kind ``run`` issues."""
    # Not torch.profiler, which imports torch's compiler first.
    profile = torch.autograd.profiler.profile(use_kineto=True)
    with profile:
        run()
    assert profile.kineto_results is not None
    return sum(event.name().startswith("c10d::") for event in profile.kineto_results.events())


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


if __name__ == "__main__":
    main()
