"""Ranks of test_distributed.py: the timeouts of a layout's groups, in seconds, go to a report."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron.steps._training.distributed import make_layout

CPU = torch.device("cpu")

if __name__ == "__main__":
    dist.init_process_group("gloo")
    layout = make_layout(2, 2, CPU, timedelta(minutes=3))
    groups = {"tensor": layout.tensor.group, "pipeline": layout.pipeline.group}
    report = {
        name: group._get_backend(CPU).options._timeout.total_seconds()
        for name, group in groups.items()
        if group is not None
    }
    layout.barrier()
    if layout.is_first:
        Path(sys.argv[-1]).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()
