"""Where a rank computes: on a GPU of its own, or on the CPU; all ranks of a job do the same.

If torch sees no GPU it says nothing, whether it was built for the CPU, the driver is too old, the
container has no devices, or the node has lost its GPUs. A job that has asked for GPUs would go on a
hundred times slower. A job of which only some ranks see GPUs would hang, since ranks that use NCCL
and ranks that use gloo wait for each other.
"""

from __future__ import annotations

import os
import socket

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from nemotron.errors import NemotronError
from nemotron.steps._training.host_memory import keep_freed_memory

# Set by launch.sh: how many GPUs the job has asked for on each node.
GPUS_PER_NODE = "NEMOTRON_GPUS_PER_NODE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NONE = ("", "-1")  # values of it by which users ask for the CPU
_ON_THE_CPU = f"set {_VISIBLE}=-1 to compute on the CPU"


def own_device() -> torch.device:
    """Return where this rank computes.

    Raises:
        NemotronError: ``too_few_gpus``: this host has fewer GPUs than ranks. ``no_gpu``: it has
            none, and the job has asked for some.
    """
    if not torch.cuda.is_available():
        _refuse_a_missing_gpu()
        keep_freed_memory()
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise NemotronError(
            "too_few_gpus",
            f"rank {local_rank} of this host has no GPU; visible GPUs: {num_gpus}",
            where="LOCAL_RANK",
            fix=f"lower the parallel sizes, or {_ON_THE_CPU}",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def refuse_mixed_devices(store: Store, rank: int, device: torch.device) -> None:
    """Compare the type of this rank's device with that of the first rank's, once that is known.

    Args:
        store: The job's store; all ranks call this with the same one.
        rank: This rank.
        device: The result of ``own_device``.

    Raises:
        NemotronError: ``mixed_devices``: they differ.
    """
    if rank == 0:
        store.set("kind", f"{device.type} {socket.gethostname()}")
    of_first, host = store.get("kind").decode().split()
    if device.type != of_first:
        raise NemotronError(
            "mixed_devices",
            f"rank {rank} on {socket.gethostname()} computes on {device.type}, "
            f"rank 0 on {host} on {of_first}",
            where=_VISIBLE,
            why="the ranks would wait for each other forever, in different libraries",
            fix="check GPUs and driver of the host that has none (nvidia-smi), or exclude it",
        )


def describe(device: torch.device) -> str:
    """Return the name of a device: that of the GPU, or the CPU with torch's version."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} (torch {torch.__version__})"


def _refuse_a_missing_gpu() -> None:
    asked = int(os.environ.get(GPUS_PER_NODE, "0"))
    if not asked or os.environ.get(_VISIBLE) in _NONE:
        return
    raise NemotronError(
        "no_gpu",
        f"the job requested {asked} GPU(s) per node; torch {torch.__version__} sees none on "
        f"{socket.gethostname()}",
        where=GPUS_PER_NODE,
        why="torch was built for the CPU, the driver is older than its CUDA, or the container has "
        "no devices",
        fix=f"check nvidia-smi and torch.cuda.init() there, or {_ON_THE_CPU}",
    )
