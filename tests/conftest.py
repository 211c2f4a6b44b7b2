"""What the tests share: forks with torch, real ranks, and disks that are soon full."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On the CPU, where results are the same bits and a host has room for any number of ranks; before
# torch looks for GPUs, and unless told otherwise.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# The same examples in every run; a busy machine is no reason to fail.
settings.register_profile(
    "fixed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

FORKED = Path(__file__).with_name("forked.py")
Fork = Callable[..., BaseProcess]
RunForked = Callable[..., tuple[int | None, str]]
StartRanks = Callable[..., "Ranks"]
RunRanks = Callable[..., dict[str, Any]]
SmallDisk = Callable[[int], Path]


def pytest_configure() -> None:
    """Take signals as behind a terminal, also under nohup or in the background of a shell."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Compute on one thread: models here are tiny, and threads wait for each other at full speed.

    On a machine with other work they do so for longer than anything else takes.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@dataclass
class Ranks:
    """Ranks that run.

    Attributes:
        processes: Theirs, in order.
        store: What they meet at; it has to live as long as they do.
        output: What all of them print.
    """

    processes: list[BaseProcess]
    store: Any
    output: Path

    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for all; return the exit code of the first one that failed, and what they printed.

        The others have some seconds more, then they are killed.
        """
        code, end = 0, time.monotonic() + seconds
        while left := [process for process in self.processes if process.is_alive()]:
            wait([process.sentinel for process in left], max(0.0, end - time.monotonic()))
            failed = [process.exitcode for process in self.processes if process.exitcode]
            if failed and not code:
                code, end = failed[0], time.monotonic() + 15
            if time.monotonic() >= end:
                code = code or 1
                for process in left:
                    process.kill()
        return code, self.output.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="session")
def fork() -> Fork:
    """Return a function that starts a program, a file or a module, with arguments.

    It is forked from a process that has imported torch, which takes it seconds otherwise. What it
    prints goes to the file ``output``; what else is named is added to its environment.
    """
    forks = multiprocessing.get_context("forkserver")
    step = "nemotron.steps.peft.megatron_bridge.step"
    forks.set_forkserver_preload(["pytest", step, "torch.distributed.run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # it is read with torch
        forkserver.ensure_running()

    def start(program: str, arguments: Sequence[str], *, output: Path, **more: str) -> BaseProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        given = {"program": program, "arguments": list(arguments)}
        given |= {"environment": environment, "output": str(output)}
        process = forks.Process(target=runpy.run_path, args=(str(FORKED), {"GIVEN": given}))
        process.start()
        return process

    return start


@pytest.fixture
def run_forked(fork: Fork, tmp_path: Path) -> RunForked:
    """Return a function that runs a program as ``fork`` does; it has two minutes.

    It returns the exit code and what was printed.
    """

    def run(program: str, *arguments: str, **more: str) -> tuple[int | None, str]:
        output = tmp_path / "printed"
        process = fork(program, arguments, output=output, **more)
        process.join(120)
        return process.exitcode, output.read_text(encoding="utf-8", errors="replace")

    return run


@pytest.fixture(scope="session")
def start_ranks(fork: Fork) -> StartRanks:
    """Return a function that starts N gloo ranks of a program, each as torchrun would."""

    def start(
        program: Path, num_ranks: int, arguments: Sequence[str], *, output: Path, **more: str
    ) -> Ranks:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks)),
            **more,
        }
        of_ranks = (dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(num_ranks))
        ranks = [
            fork(str(program), arguments, output=output, **environment, **of_rank)
            for of_rank in of_ranks
        ]
        return Ranks(ranks, store, output)

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks: StartRanks, tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """Return a function that runs a worker script on N gloo ranks and returns its JSON report.

    The worker gets the path of the report as its last argument; rank 0 writes it.
    """

    def run(worker: Path, num_ranks: int, *arguments: str) -> dict[str, Any]:
        directory = tmp_path_factory.mktemp("ranks")
        report, output = directory / "report.json", directory / "output"
        ranks = start_ranks(worker, num_ranks, [*arguments, str(report)], output=output)
        code, printed = ranks.end(300)
        assert code == 0, printed
        return json.loads(report.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Return a function that makes a directory with room for so many bytes; a page at least."""
    made: list[Path] = []

    def make(num_bytes: int) -> Path:
        path = tmp_path / f"disk_{len(made)}"
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("a disk of our own needs root that may mount one")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["umount", str(path)], check=True)
