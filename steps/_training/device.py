"""Where a rank computes: on a GPU of its own, or on the CPU, and then all ranks of the job do.

torch that sees no GPU says nothing: it is the same with a wheel for the CPU, a driver that is too
old, a container without devices, or a node that has lost its GPUs. A job that had asked for GPUs
would compute on, a hundred times slower; one of which some ranks see GPUs would wait for itself,
as NCCL and gloo do not hear each other.
"""

from __future__ import annotations

import os
import socket

import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from nemotron.errors import NemotronError
from nemotron.steps._training.host_memory import keep_freed_memory

# How many GPUs a node of this job was to have; launch.sh says it.
GPUS_PER_NODE = "NEMOTRON_GPUS_PER_NODE"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NONE = ("", "-1")  # of its values, those by which users mean that a GPU is not to be used
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
            f"rank {local_rank} of this host has no GPU: {num_gpus} are visible",
            where="LOCAL_RANK",
            fix=f"lower the parallel sizes, or {_ON_THE_CPU}",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def refuse_mixed_devices(store: Store, rank: int, device: torch.device) -> None:
    """Compare the kind of this rank's device with that of the first rank, which is waited for.

    Args:
        store: Of the job; all ranks call this with the same one.
        rank: This rank.
        device: Of ``own_device``.

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
            why="the ranks would wait for each other in different libraries, without end",
            fix="look at the GPUs and the driver of the host without (nvidia-smi), or exclude it",
        )


def describe(device: torch.device) -> str:
    """Return what a device is, in words: the GPU's name, or the CPU with torch's build."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} (torch {torch.__version__})"


def _refuse_a_missing_gpu() -> None:
    asked = int(os.environ.get(GPUS_PER_NODE, "0"))
    if not asked or os.environ.get(_VISIBLE) in _NONE:
        return
    raise NemotronError(
        "no_gpu",
        f"the job asked for {asked} GPU(s) per node; torch {torch.__version__} sees none on "
        f"{socket.gethostname()}",
        where=GPUS_PER_NODE,
        why="torch was built for the CPU, the driver is older than its CUDA, or the container has "
        "no devices",
        fix=f"look at nvidia-smi and torch.cuda.init() there, or {_ON_THE_CPU}",
    )
