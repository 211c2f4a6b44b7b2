"""What a process of a job may use of its host, and what it has used.

The launcher counts cores itself (``nemotron.processes``): a job imports nothing of the launcher.
"""

from __future__ import annotations

import os
import resource
import sys


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_host_memory_bytes() -> int:
    """Return the most memory of the host that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
