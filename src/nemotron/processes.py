"""What the system knows of processes: which one a pid means, which it has started, what it may use.

Pids are reused, in containers within minutes. A record that names a process by its pid therefore
has the process's start beside it, and whoever would signal the process asks here first. ``/proc``
answers on Linux, ``ps`` elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_of(pid: int) -> str | None:
    """Return what distinguishes a process from all others with its pid; None once it has ended.

    A zombie has ended: only its parent has not asked for its exit code yet.
    """
    if not _BOOT_ID.exists():
        return _start_from_ps(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, which may hold anything.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{_BOOT_ID.read_text().strip()} {fields[18]}"


def runs(pid: int, start: str | None) -> bool:
    """Return whether a process runs with this pid and this start.

    Args:
        pid: Its pid.
        start: What ``start_of`` returned for it; None if that was not recorded.
    """
    found = start_of(pid)
    return found is not None and start in (None, found)


def descendants(pid: int) -> list[int]:
    """Return the pids of a process's children, their children and so on, in any session."""
    parents = _parents() if _BOOT_ID.exists() else _parents_from_ps()
    found = [pid]
    for parent in found:  # which grows on the way
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _parents() -> dict[int, int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = path.read_text(encoding="utf-8", errors="replace")
            parents[int(path.parent.name)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def _parents_from_ps() -> dict[int, int]:
    command = ["ps", "-A", "-o", "pid=", "-o", "ppid="]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    pairs = (line.split() for line in done.stdout.splitlines())
    return {int(pid): int(parent) for pid, parent in pairs}


def _start_from_ps(pid: int) -> str | None:
    command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
    environment = os.environ | {"LC_ALL": "C", "TZ": "UTC"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    state, _, start = done.stdout.strip().partition(" ")
    return start.strip() if state and not state.startswith("Z") else None
