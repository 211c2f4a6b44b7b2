"""Tensors whose memory is a file's bytes in the page cache."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor


def map_tensor(path: Path, *, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the contiguous tensor whose bytes begin at ``start``.

    Writing to the tensor does not change the file. The file must not be truncated meanwhile.

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
