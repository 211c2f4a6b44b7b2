"""The process groups of a job: which ranks share the linears, the batch, and the layers.

Ranks are numbered tensor-parallel first, then data, then pipeline, as Megatron's ``tp-dp-pp``:
rank = (pipeline_rank * D + data_rank) * T + tensor_rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from nemotron.errors import NemotronError
from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_gather,
    all_reduce,
    wait_for,
)
from nemotron.steps._tensor_parallel.host_exchange import open_exchange
from nemotron.steps._training.device import own_device, refuse_mixed_devices

_SENT_AT_ONCE = 1 << 24  # bytes of a stage's tensors


@dataclass(frozen=True)
class Layout:
    """This rank's place: its groups and its device.

    Attributes:
        tensor: Ranks that share every linear of this rank's layers.
        data: Ranks with the same shards of the same layers and other rows.
        stage: Both together: all ranks that hold this rank's layers.
        pipeline: Ranks that a micro batch visits, in the order of the layers.
        world: All ranks.
        device: Where this rank computes.
    """

    tensor: ProcessGroup
    data: ProcessGroup
    stage: ProcessGroup
    pipeline: ProcessGroup
    world: ProcessGroup
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.world.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        # Not by dist.barrier: with NCCL it guesses the device, wrongly if some GPUs of a node are
        # not used.
        self.any_rank(False)

    def any_rank(self, claim: bool) -> bool:
        """Return whether the claim holds on any rank; the same answer on all of them."""
        claims = torch.tensor([float(claim)], device=self.device)
        return bool(all_reduce(claims, self.world).item())

    def from_first(self, numbers: list[int]) -> list[int]:
        """Return the numbers of the first rank on every rank; those of other ranks are ignored."""
        sent = numbers if self.is_first else [0] * len(numbers)
        tensor = torch.tensor(sent, dtype=torch.int64, device=self.device)
        return all_reduce(tensor, self.world).tolist()


@contextlib.contextmanager
def open_layout(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    data_parallel_size: int,
    timeout_minutes: int,
) -> Iterator[Layout]:
    """Yield the layout of the ranks that torchrun started; tear the groups down at the end.

    Raises:
        NemotronError: ``world_size``: torchrun started another number of ranks than TP x PP x DP;
            and what ``own_device`` and ``refuse_mixed_devices`` raise.
    """
    world_size = _world_size(
        tensor_model_parallel_size, pipeline_model_parallel_size, data_parallel_size
    )
    device = own_device()
    if world_size == 1:
        alone = ProcessGroup()
        yield Layout(alone, alone, alone, alone, alone, device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    _join_world(world_size, device, timeout)
    try:
        stage_size = tensor_model_parallel_size * data_parallel_size
        layout = make_layout(tensor_model_parallel_size, stage_size, device, timeout)
        # Making groups of NCCL waits for no rank: one that starts minutes late would be taken for
        # one that hangs.
        layout.barrier()
        yield layout
    except BaseException:
        # Destroying NCCL's groups would wait for ranks that wait for this one; leave_process ends
        # that.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def leave_process(exit_code: int) -> NoReturn:
    """End this process at once; what had to be closed is closed.

    After a failure, groups of NCCL are still open, and closing them would wait for other ranks.
    Otherwise, threads of torch may abort a process that is taken down while they run (seen once in
    some thousand runs), and its exit code would be lost.
    """
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def make_layout(
    tensor_size: int, stage_size: int, device: torch.device, timeout: timedelta | None = None
) -> Layout:
    """Return the layout of all ranks of the default process group; a collective.

    Args:
        tensor_size: Ranks of a tensor-parallel group.
        stage_size: Ranks of a pipeline stage, tensor- times data-parallel.
        device: Where this rank computes.
        timeout: How long a collective of a group may take; None: as long as torch lets it.
    """
    world_size = dist.get_world_size()
    stages = [range(first, first + stage_size) for first in range(0, world_size, stage_size)]
    world = ProcessGroup(dist.group.WORLD, dist.get_rank(), world_size)
    join = partial(_join, timeout=timeout)
    tensor = join(range(first, first + tensor_size) for first in range(0, world_size, tensor_size))
    if tensor.group is not None and device.type == "cpu":
        tensor = replace(tensor, host=open_exchange(tensor.group))
    return Layout(
        tensor=tensor,
        data=join(stage[rank::tensor_size] for stage in stages for rank in range(tensor_size)),
        stage=join(stages) if len(stages) > 1 else world,
        pipeline=join(range(rank, world_size, stage_size) for rank in range(stage_size)),
        world=world,
        device=device,
    )


def _world_size(tensor_size: int, pipeline_size: int, data_size: int) -> int:
    """Return how many ranks torchrun has started, which must be as many as the layout needs."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = tensor_size * pipeline_size * data_size
    if started != wanted:
        raise NemotronError(
            "world_size",
            f"ranks started: {started}; the layout needs {wanted} "
            f"(TP {tensor_size} x PP {pipeline_size} x DP {data_size})",
            where="WORLD_SIZE",
            fix=f"start torchrun with {wanted} rank(s), or set recipe.data_parallel_size",
        )
    return started


def _join_world(world_size: int, device: torch.device, timeout: timedelta) -> None:
    """Join the default process group, once all ranks are known to compute on the same device."""
    store, rank, _ = next(rendezvous("env://", timeout=timeout))
    refuse_mixed_devices(PrefixStore("device", store), rank, device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def _join(groups: Iterable[range], *, timeout: timedelta | None) -> ProcessGroup:
    """Return the one of these groups, disjoint and equal in size, that this rank belongs to.

    Every rank makes every group, in the same order: new_group is a collective of the world.
    """
    mine = ProcessGroup()
    for ranks in groups:
        if len(ranks) > 1:
            # Without the argument, a new group has torch's default timeout, not the world's.
            group = dist.new_group(list(ranks), timeout=timeout)
            if isinstance(group, dist.ProcessGroup):
                mine = ProcessGroup(group, ranks.index(dist.get_rank()), len(ranks))
    return mine


def gather_tensors(
    tensors: Mapping[str, Tensor], group: ProcessGroup, device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors of all ranks of a group on the CPU of its first rank, and {} on others.

    Each rank may have different tensors, of any shapes, or none. They are sent as safetensors, so
    that nothing is unpickled, and in parts, so that ``device`` need not hold a second copy of a
    stage's adapter.
    """
    gathered = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if group.size == 1:
        return gathered
    packed = torch.frombuffer(bytearray(save(gathered)), dtype=torch.uint8)
    sizes = all_gather(torch.tensor(len(packed), device=device), group).tolist()
    if group.rank > 0:
        for part in packed.split(_SENT_AT_ONCE):
            _transfer(dist.isend, part.to(device), 0, group)
        return {}
    for sender, size in enumerate(sizes[1:], start=1):
        received = torch.empty(size, dtype=torch.uint8)
        for part in received.split(_SENT_AT_ONCE):
            part.copy_(_transfer(dist.irecv, torch.empty_like(part, device=device), sender, group))
        gathered |= load(received.numpy().tobytes())
    return gathered


def _transfer(kind: Callable[..., Any], tensor: Tensor, peer: int, group: ProcessGroup) -> Tensor:
    """Send a tensor to a rank of a group, or receive it; return it once that is done."""
    operation = dist.P2POp(kind, tensor, group=group.group, group_peer=peer)
    wait_for(dist.batch_isend_irecv([operation]))
    return tensor
