"""Which process a number means: pids are given out again, in containers within minutes.

A record that names a process by its pid has its start beside it, and whoever would signal it asks
here first. ``/proc`` answers on Linux, ``ps`` elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def start_of(pid: int) -> str | None:
    """Return what tells a process from every other one with its pid; None once it is gone.

    A zombie is gone: it has ended, and only its parent has not asked how.
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
    """Return whether the process with this pid runs, and is the one that started then.

    Args:
        pid: Its number.
        start: What ``start_of`` said of it; None in records that do not know.
    """
    found = start_of(pid)
    return found is not None and start in (None, found)


def descendants(pid: int) -> list[int]:
    """Return the processes that one has started, and those that they have, in any session."""
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
