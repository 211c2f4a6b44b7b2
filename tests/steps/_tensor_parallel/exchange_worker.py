"""Ranks of test_host_exchange.py: ``exchange_worker.py WHAT REPORT``, WHAT a function in here."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.steps._tensor_parallel import host_exchange
from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_reduce,
    empty_to_send,
    gather_rows,
    gather_rows_async,
    scatter_sum_rows,
    use_rows,
)
from nemotron.steps._tensor_parallel.host_exchange import open_exchange

# Rows, in this order: each slot grows, and then holds less than it could.
SIZES = (6, 3000, 60_000, 12, 90_000, 3, 0)


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    assert world is not None
    group = ProcessGroup(world, dist.get_rank(), dist.get_world_size(), open_exchange(world))
    modes = {each.__name__: each for each in (sums, lost, whether, forbidden, unknown)}
    report = modes[sys.argv[1]](group)
    if group.rank == 0:
        Path(sys.argv[-1]).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()  # else its threads may outlive what they use, and the rank crashes


def drawn(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Return what a rank shows; any rank can draw it."""
    generator = torch.Generator().manual_seed(1000 * rank + rows)
    return (100 * torch.randn(rows, 2, generator=generator)).to(dtype)


def gathered_in_parts(rows: Tensor, group: ProcessGroup) -> Tensor:
    gathered = rows.new_empty(group.size * len(rows), *rows.shape[1:])
    use_rows(rows, group, lambda part, where: gathered[where].copy_(part))()
    return gathered


# Few shapes are kept, so that most are forgotten and met again.
@patch.object(host_exchange, "_SHAPES_KEPT", 3)
def sums(group: ProcessGroup) -> dict[str, bool]:
    """Every collective against the same made of the tensors of all ranks, bit for bit."""
    assert group.host is not None
    report = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        for rows in SIZES:
            every = [drawn(rank, rows, dtype) for rank in range(group.size)]
            mine, total = every[group.rank].clone(), every[0].clone()
            for each in every[1:]:
                total += each
            part = slice(group.rank * rows // group.size, (group.rank + 1) * rows // group.size)
            for collective, wanted in (
                (all_reduce, total),
                (gather_rows, torch.cat(every)),
                (gathered_in_parts, torch.cat(every)),
                (scatter_sum_rows, total[part]),
            ):
                placed = empty_to_send(mine, 2, group).copy_(mine)
                name = f"{dtype} {rows} placed for {collective.__name__}"
                report[name] = torch.equal(collective(placed, group), wanted)
            strided = torch.cat([mine, mine], dim=1)[:, :2]
            report[f"{dtype} {rows}"] = all(
                (
                    torch.equal(gather_rows(strided, group), torch.cat(every)),
                    torch.equal(scatter_sum_rows(mine, group), total[part]),
                    torch.equal(all_reduce(mine, group), total),
                    torch.equal(mine, total),
                )
            )
    report |= {"a slow reader": before_a_slow_reader(group), "after it grew": after_it_grew(group)}
    return report | several_at_once(group)


def several_at_once(group: ProcessGroup) -> dict[str, bool]:
    """Start three before the first is waited for, last first, and change what was shown."""
    assert group.group is not None
    new = replace(group, host=open_exchange(group.group))  # with no memory yet
    every = [[drawn(rank, rows, torch.float32) for rank in range(group.size)] for rows in (50, 0)]
    every.append([2 * each for each in every[0]])
    shown = [each[group.rank].clone() for each in every]
    started = [gather_rows_async(each, new) for each in shown]
    for each in shown:
        each.zero_()
    for _, wait in reversed(started):
        wait()
    right = [
        torch.equal(got, torch.cat(each)) for each, (got, _) in zip(every, started, strict=True)
    ]
    return {"several at once": all(right)}


def before_a_slow_reader(group: ProcessGroup) -> bool:
    """Whether a rank that reads late has read what was shown, not what comes after the next."""
    gathered, wait = gather_rows_async(torch.ones(4, 2), group)
    if group.rank == 1:
        time.sleep(0.5)
    wait()
    _, wait = gather_rows_async(torch.ones(4, 2), group)
    placed = empty_to_send(gathered[:4], 2, group).fill_(2.0)
    wait()
    all_reduce(placed, group)
    num_wrong = (gathered != 1.0).sum().unsqueeze(0)
    return all_reduce(num_wrong, group).item() == 0


@patch.object(host_exchange, "_SHAPES_KEPT", 64)
def after_it_grew(group: ProcessGroup) -> bool:
    """Whether a sum of a shape from before the memory grew is the rank's own, and stays."""
    assert group.group is not None
    new = replace(group, host=open_exchange(group.group))

    def sum_of(rows: int, value: float) -> Tensor:
        placed = empty_to_send(torch.empty(rows, 2), 2, new)
        return all_reduce(placed.fill_(value), new)

    for rows in (3, 3, 50_000, 50_000):  # in either slot
        sum_of(rows, 1.0)
    first = sum_of(3, 1.0)
    for _ in range(2):
        sum_of(3, 2.0)
    num_wrong = (first != new.size).sum().unsqueeze(0)
    return all_reduce(num_wrong, group).item() == 0


def lost(group: ProcessGroup) -> dict[str, str]:
    """What a rank is told when another shows something else, and when one has gone."""
    assert group.group is not None
    another = replace(group, host=open_exchange(group.group))
    told = {"other size": error_of(group, rows=4 + (group.rank == 1))}
    if group.rank == group.size - 1:
        os._exit(0)
    return told | {"gone": error_of(another, rows=4)}


def error_of(group: ProcessGroup, *, rows: int) -> str:
    try:
        all_reduce(torch.zeros(rows), group)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def forbidden(group: ProcessGroup) -> dict[str, object]:
    """As ``whether``, where one rank may not open what the others offer."""
    hindrance = patch.object(os, "open", side_effect=PermissionError)
    with hindrance if group.rank == 1 else nullcontext():
        return _opened_again(group)


def unknown(group: ProcessGroup) -> dict[str, object]:
    """As ``whether``, where nothing tells the hosts apart."""
    with patch.object(host_exchange, "_BOOT_ID", Path("/does/not/exist")):
        return _opened_again(group)


def _opened_again(group: ProcessGroup) -> dict[str, object]:
    assert group.group is not None
    return whether(replace(group, host=open_exchange(group.group)))


def whether(group: ProcessGroup) -> dict[str, object]:
    """Whether there is an exchange, and the sum of the ranks' numbers either way."""
    total = all_reduce(torch.tensor([float(group.rank + 1)]), group)
    return {"exchange": group.host is not None, "total": total.item()}


if __name__ == "__main__":
    main()
