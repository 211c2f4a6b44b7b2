"""Shows tensors to the other ranks of one host through shared memory, for ranks on the CPU.

gloo sends a tensor through sockets even to a process on the same host: the kernel copies it twice,
and gloo's own threads add it up. Here each rank writes its tensor once into memory that all ranks
map, and reads the others' tensors there. Only the message that a tensor is ready is sent: 8 bytes
through a pipe, whose end of file also tells that a rank has gone.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

_SHAPES_KEPT = 64  # per slot: all layers use the same shapes, rows of other lengths use others
_SIZE_BYTES = 8  # of a message in a pipe: the size of the tensor that is there
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
Receive = Callable[[list[Tensor]], object]


class HostExchange:
    """Shows tensors to all ranks of a group on one host; every rank makes the same calls.

    Each rank has two slots and uses them in turn. It shows its next tensor only after it has read
    the last tensor of all other ranks. So once the others have shown message n, they have read
    message n - 1, and its slot is free for message n + 1.

    Args:
        rank: This process's rank in the group.
        slots: Two slots of each rank.
        readers: Pipes that the other ranks write to, by rank.
        writers: Pipes that the other ranks read, by rank.
    """

    def __init__(
        self,
        rank: int,
        slots: Sequence[Sequence[_Slot]],
        readers: dict[int, int],
        writers: dict[int, int],
    ) -> None:
        self._rank, self._slots, self._readers, self._writers = rank, slots, readers, writers
        self._number = 0
        self._finish: Callable[[], object] | None = None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for the next tensor to show, which then need not be copied."""
        self._finish_last()
        return self._next_slot().grown(torch.Size(shape), dtype)

    def is_next(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the one that ``empty`` returned last."""
        return tensor.data_ptr() == self._next_slot().address()

    def start(self, tensor: Tensor, receive: Receive) -> Callable[[], None]:
        """Show a tensor to the others; return a function that waits for theirs.

        The function passes the tensors of all ranks to ``receive``. It waits for all exchanges that
        were started by then.

        Args:
            tensor: Has the same size and type on every rank. It may be changed once this returns;
                one from ``empty`` must not be used any more.
            receive: Called once, by the returned function or by the next ``start``, with the
                tensors of all ranks in the order of the ranks. They must not be used after it
                returns.

        Raises:
            DistNetworkError: Another rank has gone, or shows another size; raised here or by the
                returned function.
        """
        self._finish_last()
        shape, dtype = tensor.shape, tensor.dtype
        if not self.is_next(tensor):
            self.empty(shape, dtype).copy_(tensor.detach())
        self._number += 1
        number = self._number
        message = tensor.nbytes.to_bytes(_SIZE_BYTES, "little")
        for rank, pipe in self._writers.items():
            try:
                os.write(pipe, message)
            except BrokenPipeError:
                _lost(rank)

        def finish() -> None:
            for rank, pipe in self._readers.items():
                if (told := os.read(pipe, _SIZE_BYTES)) != message:
                    _lost(rank, told, message)
            receive([slots[number % 2].tensor(shape, dtype) for slots in self._slots])

        self._finish = finish
        return self._finish_last

    def _next_slot(self) -> _Slot:
        return self._slots[self._rank][(self._number + 1) % 2]

    def _finish_last(self) -> None:
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


def open_exchange(group: dist.ProcessGroup) -> HostExchange | None:
    """Return the exchange of a gloo group, or None if its ranks cannot share memory; a collective.

    They can if they are one user's processes on one Linux host, in one PID namespace. Descriptors
    that are opened for the exchange stay open until the process ends.
    """
    if sys.platform != "linux":
        return None
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    others = [other for other in range(size) if other != rank]
    with ExitStack() as offered, ExitStack() as opened:
        slots = [_close_with(offered, os.memfd_create("tensors")) for _ in range(2)]
        readers, writers = [-1] * size, {}
        for other in others:
            reader, writer = os.pipe()
            readers[other] = _close_with(offered, reader)
            writers[other] = _close_with(opened, writer)
        host = _host()
        offers = _gather([*host, os.getpid(), *slots, *readers], group)
        exchange = None
        if any(host) and all(offer[: len(host)] == host for offer in offers):
            with suppress(OSError):  # a container may forbid it
                exchange = _accept(rank, [offer[len(host) :] for offer in offers], writers, opened)
        if [0] in _gather([int(exchange is not None)], group):
            return None
        opened.pop_all()
        return exchange


def _accept(
    rank: int, offers: list[list[int]], writers: dict[int, int], opened: ExitStack
) -> HostExchange:
    """Open what the ranks offer: each its process id, and descriptors of its slots and pipes."""

    def open_descriptor(process: int, descriptor: int, flags: int) -> int:
        return _close_with(opened, os.open(f"/proc/{process}/fd/{descriptor}", flags))

    slots = [
        [_Slot(open_descriptor(process, each, os.O_RDWR)) for each in offer[:2]]
        for process, *offer in offers
    ]
    readers = {
        other: open_descriptor(process, offer[2 + rank], os.O_RDONLY)
        for other, (process, *offer) in enumerate(offers)
        if other != rank
    }
    return HostExchange(rank, slots, readers, writers)


def _gather(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Return the numbers of every rank, in the order of the ranks."""
    sent = torch.tensor(numbers, dtype=torch.int64)
    gathered = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, sent, group=group)
    return [each.tolist() for each in gathered]


def _host() -> list[int]:
    """Return numbers that are equal for processes that see each other; zeros if that is unknown."""
    try:
        boot_id = uuid.UUID(_BOOT_ID.read_text(encoding="ascii").strip())
        return [boot_id.int >> 65, _PID_NAMESPACE.stat().st_ino]
    except (OSError, ValueError):
        return [0, 0]


def _close_with(stack: ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


class _Slot:
    """Shared memory of one rank, as large as the largest tensor that it has held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._tensors: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def grown(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the memory as a tensor for this rank to write, grown if it is too small."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            os.ftruncate(self._descriptor, size)
        return self.tensor(shape, dtype)

    def address(self) -> int:
        """Return the address at which the memory begins."""
        return self._bytes.data_ptr()

    def tensor(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the memory as a tensor, without a copy."""
        known = self._tensors.get((shape, dtype))
        if known is not None:
            return known
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
            self._tensors.clear()  # they are views of the earlier map
        elif len(self._tensors) == _SHAPES_KEPT:
            self._tensors.clear()
        tensor = self._bytes[:size].view(dtype).view(shape)
        self._tensors[shape, dtype] = tensor
        return tensor


def _lost(rank: int, told: bytes = b"", wanted: bytes = b"") -> NoReturn:
    if told:
        sizes = [int.from_bytes(size, "little") for size in (told, wanted)]
        problem = "rank {} of the group shows another tensor: {} bytes, not {}"
        raise dist.DistNetworkError(problem.format(rank, *sizes))
    raise dist.DistNetworkError(f"connection closed by peer: rank {rank} of the group has gone")
