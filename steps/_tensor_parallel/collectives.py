"""The collectives of the core, and the process group that they run over.

All data that tensor-parallel ranks exchange goes through this module, so that a test can count the
exchanges, and so that two traps are dealt with in one place: gloo silently corrupts tensors that
are not contiguous, and torch 2.13 has renamed the single-tensor all-gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.steps._tensor_parallel.host_exchange import HostExchange


@dataclass(frozen=True)
class ProcessGroup:
    """A process group with this rank's place in it; ``group`` is None if the size is 1.

    If all ranks are on the CPU of one host, ``host`` replaces ``group`` in the collectives.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    host: HostExchange | None = None


Wait = Callable[[], None]
# Called with some ranks' rows, [n, C], valid only during the call, and their slice of [S, C].
UseRows = Callable[[Tensor, slice], object]


def empty_to_send(like: Tensor, columns: int, group: ProcessGroup) -> Tensor:
    """Return a tensor, [rows of ``like``, columns], to be filled and passed to the next collective.

    On a shared host it is memory that the other ranks read, and must not be used after that.
    """
    shape = len(like), columns
    return group.host.empty(shape, like.dtype) if group.host else like.new_empty(shape)


def all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of ``tensor`` over the group, in place unless it is from ``empty_to_send``.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    return _finished(all_reduce_async(tensor, group))


def all_reduce_async(tensor: Tensor, group: ProcessGroup) -> tuple[Tensor, Wait]:
    """Start ``all_reduce``; return the sum, and a function to call before the sum is used.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if group.size == 1:
        return tensor, _nothing
    if not tensor.is_contiguous():
        raise ValueError(f"all_reduce wants a contiguous tensor, got strides {tensor.stride()}")
    if group.host is not None:
        out = torch.empty_like(tensor) if group.host.is_next(tensor) else tensor
        return out, group.host.start(tensor, partial(_add_up, out=out))
    return tensor, _waiter(dist.all_reduce(tensor, group=group.group, async_op=True))


def gather_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks, one rank after the other: [S / T, C] becomes [S, C]."""
    return _finished(gather_rows_async(rows, group))


def gather_rows_async(rows: Tensor, group: ProcessGroup) -> tuple[Tensor, Wait]:
    """Start ``gather_rows``; return the rows, and a function to call before they are used."""
    if group.size == 1:
        return rows, _nothing
    gathered = rows.new_empty(group.size * len(rows), *rows.shape[1:])
    if group.host is not None:
        return gathered, group.host.start(rows, partial(torch.cat, out=gathered))
    work = _all_gather_single(gathered, rows.contiguous(), group=group.group, async_op=True)
    return gathered, _waiter(work)


def use_rows(rows: Tensor, group: ProcessGroup, use: UseRows) -> Wait:
    """Start gathering the rows of all ranks; return what waits for them and passes them to ``use``.

    On a shared host each rank's rows are used where they are, without being concatenated.
    """
    if group.host is not None:
        return group.host.start(rows, partial(_use_each, use=use))
    gathered, wait = gather_rows_async(rows, group)

    def finish() -> None:
        wait()
        use(gathered, slice(0, len(gathered)))

    return finish


def _use_each(parts: list[Tensor], *, use: UseRows) -> None:
    for rank, part in enumerate(parts):
        use(part, slice(rank * len(part), (rank + 1) * len(part)))


def scatter_sum_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's part of the rows summed over the group: [S, C] becomes [S / T, C]."""
    return _finished(scatter_sum_rows_async(rows, group))


def scatter_sum_rows_async(rows: Tensor, group: ProcessGroup) -> tuple[Tensor, Wait]:
    """Start ``scatter_sum_rows``; return the part, and a function to call before it is used."""
    if group.size == 1:
        return rows, _nothing
    part = rows.new_empty(len(rows) // group.size, *rows.shape[1:])
    if group.host is not None:
        mine = slice(group.rank * len(part), (group.rank + 1) * len(part))
        return part, group.host.start(
            rows, lambda tensors: _add_up([each[mine] for each in tensors], out=part)
        )
    return part, _reduce_scatter(part, rows.contiguous(), group)


def _reduce_scatter(part: Tensor, rows: Tensor, group: ProcessGroup) -> Wait:
    """Start a reduce-scatter into ``part``; return a function that waits for it.

    torch's reduce-scatter over gloo is an all-reduce of which each rank keeps a part, which sends
    twice the bytes. So over gloo each rank is sent its parts and adds them up itself.
    """
    if dist.get_backend(group.group) != "gloo":
        return _waiter(_reduce_scatter_single(part, rows, group=group.group, async_op=True))
    parts = torch.empty_like(rows)
    exchange = dist.all_to_all_single(parts, rows, group=group.group, async_op=True)

    def wait() -> None:
        wait_for([exchange])
        torch.sum(parts.unflatten(0, (group.size, -1)), dim=0, out=part)

    return wait


def all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the group's tensors stacked: ``[...]`` on each rank becomes ``[T, ...]``."""
    return gather_rows(tensor.unsqueeze(0), group)


def broadcast(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return a copy of the first rank's tensor, which has the same shape on every rank."""
    copy = tensor.clone(memory_format=torch.contiguous_format)
    if group.size > 1:
        wait_for([dist.broadcast(copy, group=group.group, group_src=0, async_op=True)])
    return copy


def _either(name: str, old_name: str) -> Any:
    """Return a function of torch by its new name, or by the one that it had before torch 2.13."""
    return getattr(dist, name, None) or getattr(dist, old_name)


_all_gather_single = _either("all_gather_single", "all_gather_into_tensor")
_reduce_scatter_single = _either("reduce_scatter_single", "reduce_scatter_tensor")


def _add_up(tensors: list[Tensor], *, out: Tensor) -> None:
    """Add tensors in their order, so that the sum has the same bits on every rank."""
    torch.add(tensors[0], tensors[1], out=out)
    for each in tensors[2:]:
        out.add_(each)


def _finished(started: tuple[Tensor, Wait]) -> Tensor:
    tensor, wait = started
    wait()
    return tensor


def wait_for(works: list[Any]) -> None:
    """Wait for transfers and forget them: gloo waits forever for one that was waited for already.

    A rank that is in this function waits for another rank, by which the heartbeat recognises that.
    """
    while works:
        works.pop().wait()


def _waiter(work: Any) -> Wait:
    return lambda: wait_for([work])


def _nothing() -> None:
    """Do nothing: a group of one has nothing to wait for."""


def partition(size: int, group: ProcessGroup, what: str) -> slice:
    """Return this rank's contiguous part of a dimension.

    Raises:
        ValueError: ``size`` is not divisible by the size of the group; names ``what`` and both.
    """
    if size % group.size:
        raise ValueError(
            f"{what} {size} is not divisible by tensor_model_parallel_size {group.size}"
        )
    part = size // group.size
    return slice(group.rank * part, (group.rank + 1) * part)
