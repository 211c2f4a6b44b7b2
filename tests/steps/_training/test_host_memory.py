"""Freed memory stays with a rank: a fresh process counts its page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

# 20 MiB: above glibc's first threshold of 128 KiB, and freed at the top of the heap.
FAULTS = """
import ctypes, resource, sys
from nemotron.steps._training.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def use():
    block = libc.malloc(ctypes.c_size_t(20 * 2**20))
    ctypes.memset(block, 1, 20 * 2**20)
    libc.free(ctypes.c_void_p(block))

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    kept, given_back = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("kept", "given back")
    )
    assert kept < 100
    assert given_back > 1000
