"""What counts as work of a rank: seen from outside of its main thread."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.conftest import RunForked

# The parent of a process that glibc spawns waits in the kernel until the new one has executed its
# program, as it waits for a disk: here until somebody opens the pipe that is to be its input.
SPAWNS = """
import ctypes, os, sys, threading, time
from nemotron.steps._training.heartbeat import _MainThread
from nemotron.steps._training.read_ahead import ReadAhead

def watch():
    main = _MainThread()
    time.sleep(0.5)
    main.works()
    time.sleep(0.5)
    print(main.works(), flush=True)
    if sys.argv[1] == "disk":
        os.close(os.open(sys.argv[2], os.O_WRONLY))

threading.Thread(target=watch).start()
def compute(number):
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        pass

if sys.argv[1] == "reader":
    ReadAhead(compute).take(1, has_next=False)
elif sys.argv[1] == "disk":
    library, actions, pid = ctypes.CDLL(None), ctypes.create_string_buffer(1024), ctypes.c_int()
    library.posix_spawn_file_actions_init(actions)
    library.posix_spawn_file_actions_addopen(actions, 0, sys.argv[2].encode(), os.O_RDONLY, 0)
    argv = (ctypes.c_char_p * 2)(b"true", None)
    # Not os.posix_spawn, which would keep Python's lock.
    library.posix_spawn(ctypes.byref(pid), b"/bin/true", actions, None, argv, argv)
    os.waitpid(pid.value, 0)
else:
    time.sleep(1.5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a thread is Linux's to tell")
@pytest.mark.parametrize(
    ("waits_for", "works"), [("disk", "True"), ("reader", "True"), ("nothing", "False")]
)
def test_a_rank_that_waits_for_a_disk_or_its_rows_works_and_one_that_sleeps_does_not(
    tmp_path: Path, run_forked: RunForked, waits_for: str, works: str
) -> None:
    program, pipe = tmp_path / "spawns.py", tmp_path / "pipe"
    program.write_text(SPAWNS, encoding="utf-8")
    os.mkfifo(pipe)
    _, printed = run_forked(str(program), waits_for, str(pipe))
    assert printed.split() == [works]
