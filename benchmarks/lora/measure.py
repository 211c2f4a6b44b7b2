"""What every side of a benchmark measures itself with: CPU seconds, and memory above a point.

Imports nothing but torch, because peers run in an environment without this project.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def measure_steps(step: Callable[[], float], *, num_steps: int) -> dict[str, float]:
    """Run ``step`` and return what it cost.

    Returns:
        ``cpu_seconds``: process time (all threads) of the fastest step after the first.
        ``seconds``: wall clock of the fastest step after the first.
        ``peak_mb``: highest resident memory during the steps above that before them, MB.
        ``first_loss`` and ``last_loss``: what the first and the last step returned.
    """
    before = start_peak_memory()
    cpu, wall, losses = [], [], []
    for _ in range(num_steps):
        started = time.perf_counter(), time.process_time()
        losses.append(step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
    return {
        "cpu_seconds": min(cpu[1:]),
        "seconds": min(wall[1:]),
        "peak_mb": peak_memory() - before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def start_peak_memory() -> float:
    """Give freed memory back, start the peak anew, and return what is resident now, MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_mb("VmRSS")


def peak_memory() -> float:
    """Return the highest memory since ``start_peak_memory``, MB: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


def write_result(case: Path, side: str, rank: int, result: dict[str, float]) -> None:
    """Leave a rank's figures in the case's directory."""
    (case / f"{side}.{rank}.json").write_text(json.dumps(result), encoding="utf-8")
