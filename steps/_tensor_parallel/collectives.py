"""The collectives of the core, and the process group that they run over.

Every exchange of data between tensor-parallel ranks goes through this module, so that a test can
count them, and so that the traps live in one place: gloo silently corrupts non-contiguous tensors,
and torch 2.13 renames the single-tensor all-gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ProcessGroup:
    """A process group with this rank's place in it; ``group`` is None where the size is 1."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1


def all_reduce(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Sum ``tensor`` over the group, in place, and return it.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    all_reduce_async(tensor, group)()
    return tensor


def all_reduce_async(tensor: Tensor, group: ProcessGroup) -> Callable[[], None]:
    """Start summing ``tensor`` over the group, in place; call the result to wait for the sum.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if group.size == 1:
        return lambda: None
    if not tensor.is_contiguous():
        raise ValueError(f"all_reduce wants a contiguous tensor, got strides {tensor.stride()}")
    work = dist.all_reduce(tensor, group=group.group, async_op=True)
    assert work is not None  # only ranks outside the group get None

    def wait() -> None:
        work.wait()

    return wait


def all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the group's tensors stacked: ``[...]`` on each rank becomes ``[T, ...]``."""
    if group.size == 1:
        return tensor.unsqueeze(0)
    gathered = tensor.new_empty(group.size * tensor.numel())
    _all_gather_single(gathered, tensor.reshape(-1), group=group.group)
    return gathered.view(group.size, *tensor.shape)


_all_gather_single = (
    dist.all_gather_single  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(dist, "all_gather_single")
    else dist.all_gather_into_tensor
)


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
