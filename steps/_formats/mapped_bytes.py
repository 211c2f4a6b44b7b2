"""Tensors on memory of their own: a file's bytes in the page cache, or fresh pages of 2 MiB."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor


def map_tensor(path: Path, *, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the contiguous tensor whose bytes begin at ``start``.

    It can be written to, which changes no file. The file must not be cut while it is used.

    Raises:
        ValueError: The file is shorter.
    """
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    skipped = start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        mapped = mmap.mmap(
            stream.fileno(),
            skipped + count * dtype.itemsize,
            access=mmap.ACCESS_COPY,
            offset=start - skipped,
        )
    content = torch.frombuffer(mapped, dtype=torch.uint8, offset=skipped)
    tensor = content.view(dtype).reshape(shape)
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()


def fresh_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of unknown values, to be filled and soon freed.

    The kernel takes longer to hand out fresh memory in pages of 4 KiB than many a computation takes
    that writes there; in pages of 2 MiB, where it has them, half as long.
    """
    count = torch.Size(shape).numel()
    if count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):  # other systems choose by themselves
        return torch.empty(shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=dtype).reshape(shape)
