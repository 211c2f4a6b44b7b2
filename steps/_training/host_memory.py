"""Memory of a rank that computes on the CPU: kept from step to step, as a GPU's allocator keeps it.

Every step allocates and frees the same activations. By default glibc gives the large ones back to
the kernel as they are freed, and the next step takes a page fault for every 4 KiB of them.
"""

from __future__ import annotations

import ctypes

# <malloc.h>. Both are needed: setting one of them ends glibc's adjusting of the other.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory up to 32 MiB a tensor; does nothing under another C library.

    What a process holds is then the most it ever used, which is what a job has to fit anyway.
    Source: mallopt(3).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
