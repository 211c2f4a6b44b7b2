"""Ranks of test_flat_adapter.py: gradients summed, and what is found where copies differ.

``replicas_worker.py REPORT``: of each case what every rank found, and the most elements that a
rank received at once. The copies are those of the data-parallel ranks. Of a replicated factor's
gradient what every rank has after it was summed, where groups side by side add in other orders.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_gather, broadcast
from nemotron.steps._tensor_parallel.linear import LoraParameter
from nemotron.steps._training import flat_adapter
from nemotron.steps._training.distributed import Layout, make_layout
from nemotron.steps._training.flat_adapter import FlatAdapter

NUM_RANKS = 6
# The copies of rank 0, rank 1, ...
CASES = {
    "equal": [[1.0, 2.0, 3.0]] * NUM_RANKS,
    "one rank differs": [[1.0, 2.0, 3.0]] * (NUM_RANKS - 1) + [[1.0, 2.5, 3.25]],
    "the first rank is not a number": [[math.nan, 2.0, 3.0]] + [[1.0, 2.0, 3.0]] * (NUM_RANKS - 1),
    "another rank is not a number": [[1.0, 2.0, 3.0]] * (NUM_RANKS - 1) + [[math.nan, 2.0, 3.0]],
    "no factors": [[]] * NUM_RANKS,
}
CPU = torch.device("cpu")
received: list[int] = []


def main() -> None:
    dist.init_process_group("gloo")
    flat_adapter._COMPARED_AT_ONCE = 2
    flat_adapter.broadcast = counted
    layout = make_layout(1, NUM_RANKS, CPU)
    found = {name: difference(layout, copies[layout.data.rank]) for name, copies in CASES.items()}
    report: dict[str, Any] = {
        name: all_gather(torch.tensor(each), layout.world).tolist() for name, each in found.items()
    }
    split = make_layout(2, NUM_RANKS, CPU)
    # In fp32 the second sum is 0 or 1, as the order has it.
    for name, parts in {"sums": (1.0, 2.0, 3.0), "sums that round": (1.0, 1e8, -1e8)}.items():
        report[name] = all_gather(summed(split, parts), layout.world).flatten().tolist()
    if layout.is_first:
        report["elements received at once"] = max(received)
        Path(sys.argv[-1]).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def counted(tensor: Tensor, group: ProcessGroup) -> Tensor:
    copies = broadcast(tensor, group)
    received.append(copies.numel())
    return copies


def difference(layout: Layout, own: list[float]) -> float:
    factors = [LoraParameter("x.lora_a", nn.Parameter(torch.tensor(own)), "replicated")]
    return FlatAdapter(factors if own else [], layout).replica_difference()


def summed(layout: Layout, parts: tuple[float, ...]) -> Tensor:
    """Return a replicated factor's gradient, summed of those of the data-parallel ranks."""

    def all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
        own = [*all_gather(tensor, group)]
        ordered = own if group is layout.stage or layout.tensor.rank == 0 else own[::-1]
        return tensor.copy_(functools.reduce(torch.add, ordered))

    flat_adapter.all_reduce = all_reduce
    factor = LoraParameter("x.lora_b", nn.Parameter(torch.zeros(1)), "replicated")
    adapter = FlatAdapter([factor], layout)
    adapter.gradients.fill_(parts[layout.data.rank])
    adapter.reduce_gradients()
    return adapter.gradients


if __name__ == "__main__":
    main()
