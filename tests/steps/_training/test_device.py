"""Where a rank computes: never on the CPU because a GPU that was asked for is not seen."""

from __future__ import annotations

import socket

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from nemotron.errors import NemotronError
from nemotron.steps._training.device import (
    GPUS_PER_NODE,
    describe,
    own_device,
    refuse_mixed_devices,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
without_gpus = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_gpus
@pytest.mark.parametrize("none", ["", "-1"])
def test_a_job_that_asked_for_gpus_does_not_compute_on_the_cpu_unless_told_to(
    monkeypatch: pytest.MonkeyPatch, none: str
) -> None:
    monkeypatch.setenv(GPUS_PER_NODE, "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(NemotronError) as caught:
        own_device()
    assert caught.value.code == "no_gpu"
    assert f"sees none on {socket.gethostname()}" in caught.value.problem
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    assert own_device() == CPU


@without_gpus
def test_a_job_that_asked_for_none_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS_PER_NODE, "0")
    assert own_device() == CPU
    monkeypatch.delenv(GPUS_PER_NODE)
    assert own_device() == CPU
    assert describe(CPU) == f"cpu (torch {torch.__version__})"


@pytest.mark.parametrize(("first", "other"), [(CUDA, CPU), (CPU, CUDA)])
def test_ranks_of_which_some_see_no_gpu_are_refused_before_they_wait_for_each_other(
    first: torch.device, other: torch.device
) -> None:
    store = HashStore()
    for rank in range(2):
        refuse_mixed_devices(store, rank, first)
    with pytest.raises(
        NemotronError, match=f"rank 2 on .* on {other.type}, rank 0 on .*"
    ) as caught:
        refuse_mixed_devices(store, 2, other)
    assert caught.value.code == "mixed_devices"
