"""The process groups of a job: which ranks share the linears, and which share the batch.

Ranks are numbered tensor-parallel first, as in Megatron: rank = data_rank * T + tensor_rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nemotron.errors import NemotronError
from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_reduce


@dataclass(frozen=True)
class Layout:
    """This rank's place: its tensor- and data-parallel groups, all ranks, and its device."""

    tensor: ProcessGroup
    data: ProcessGroup
    world: ProcessGroup
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.world.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world.size > 1:
            dist.barrier(group=self.world.group)

    def any_rank(self, claim: bool) -> bool:
        """Return whether the claim holds on any rank; the same answer on all of them."""
        claims = torch.tensor([float(claim)], device=self.device)
        return bool(all_reduce(claims, self.world).item())

    def from_first(self, numbers: list[int]) -> list[int]:
        """Return the numbers that the first rank has passed, on every rank."""
        sent = numbers if self.is_first else [0] * len(numbers)
        tensor = torch.tensor(sent, dtype=torch.int64, device=self.device)
        return all_reduce(tensor, self.world).tolist()


@contextlib.contextmanager
def open_layout(
    *, tensor_model_parallel_size: int, data_parallel_size: int, timeout_minutes: int
) -> Iterator[Layout]:
    """Yield the layout of the ranks that torchrun started; tear the groups down at the end.

    Raises:
        NemotronError: ``world_size``: torchrun started another number of ranks than TP x DP.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = tensor_model_parallel_size * data_parallel_size
    if world_size != wanted:
        raise NemotronError(
            "world_size",
            f"{world_size} ranks were started; the layout needs {wanted} "
            f"(TP {tensor_model_parallel_size} x DP {data_parallel_size})",
            where="WORLD_SIZE",
            fix=f"start torchrun with {wanted} ranks, or set recipe.data_parallel_size",
        )
    device = _device()
    if world_size == 1:
        yield Layout(ProcessGroup(), ProcessGroup(), ProcessGroup(), device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield _make_groups(tensor_model_parallel_size, data_parallel_size, device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _make_groups(tensor_size: int, data_size: int, device: torch.device) -> Layout:
    rank = dist.get_rank()
    data_rank, tensor_rank = divmod(rank, tensor_size)
    # Every rank makes every group, in the same order: new_group is a collective of the world.
    world_size = tensor_size * data_size
    tensor_groups = [
        _new_group(range(first, first + tensor_size)) for first in range(0, world_size, tensor_size)
    ]
    data_groups = [
        _new_group(range(first, world_size, tensor_size)) for first in range(tensor_size)
    ]
    return Layout(
        tensor=ProcessGroup(tensor_groups[data_rank], tensor_rank, tensor_size),
        data=ProcessGroup(data_groups[tensor_rank], data_rank, data_size),
        world=ProcessGroup(dist.group.WORLD, rank, world_size),
        device=device,
    )


def _new_group(ranks: range) -> dist.ProcessGroup | None:
    group = dist.new_group(list(ranks))
    return group if isinstance(group, dist.ProcessGroup) else None
