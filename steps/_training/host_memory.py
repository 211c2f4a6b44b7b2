"""Lets a rank on the CPU keep its freed memory from step to step, as a GPU's allocator does.

Every step allocates and frees the same activations. By default glibc returns the large ones to the
kernel when they are freed, and the next step takes a page fault for every 4 KiB of them.
"""

from __future__ import annotations

import ctypes

# <malloc.h>. Both are needed: setting one of them stops glibc from adjusting the other.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more on 64 bits
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory of tensors up to 32 MiB; does nothing with another C library.

    The process then keeps as much memory as it ever used, which the job must have anyway.
    Source: mallopt(3).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
