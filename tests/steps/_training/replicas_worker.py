"""Ranks of test_flat_adapter.py: what each finds where their copies of an adapter differ.

``replicas_worker.py REPORT``: of each case what every rank found, and the most elements that a
rank received at once. The copies are those of the data-parallel ranks.
"""

from __future__ import annotations

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

# The copies of rank 0, rank 1, ...
CASES = {
    "equal": [[1.0, 2.0, 3.0]] * 4,
    "one rank differs": [[1.0, 2.0, 3.0]] * 3 + [[1.0, 2.5, 3.25]],
    "the first rank is not a number": [[math.nan, 2.0, 3.0]] + [[1.0, 2.0, 3.0]] * 3,
    "another rank is not a number": [[1.0, 2.0, 3.0]] * 3 + [[math.nan, 2.0, 3.0]],
    "no factors": [[]] * 4,
}
received: list[int] = []


def main() -> None:
    dist.init_process_group("gloo")
    flat_adapter._COMPARED_AT_ONCE = 2
    flat_adapter.broadcast = counted
    layout = make_layout(1, dist.get_world_size(), torch.device("cpu"))
    found = {name: difference(layout, copies[layout.data.rank]) for name, copies in CASES.items()}
    report: dict[str, Any] = {
        name: all_gather(torch.tensor(each), layout.world).tolist() for name, each in found.items()
    }
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


if __name__ == "__main__":
    main()
