"""What every side of a benchmark measures itself with: CPU seconds, and memory above a point.

Imports nothing but torch, because peers run in an environment without this project.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
    spent, losses = [], []
    for _ in range(num_steps):
        used, loss = _spent(step)
        spent.append(used)
        losses.append(loss)
    return _fastest(spent) | {
        "peak_mb": peak_memory() - before,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def measure_in_turns(
    steps: Mapping[str, Callable[[], float]], *, num_steps: int
) -> dict[str, dict[str, float]]:
    """Run ``steps`` one after the other, ``num_steps`` times, and return each one's seconds.

    What takes turns so closely can be compared on a machine whose speed changes by the minute.
    """
    spent = {name: [] for name in steps}
    for _ in range(num_steps):
        for name, step in steps.items():
            spent[name].append(_spent(step)[0])
    return {name: _fastest(each) for name, each in spent.items()}


def _spent(step: Callable[[], float]) -> tuple[tuple[float, float], float]:
    """Return the process time and the wall clock of a step, seconds, and what it returned."""
    started = time.process_time(), time.perf_counter()
    loss = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.process_time() - started[0], time.perf_counter() - started[1]), loss


def _fastest(spent: Sequence[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = zip(*spent[1:], strict=True)
    return {"cpu_seconds": min(cpu), "seconds": min(wall)}


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
