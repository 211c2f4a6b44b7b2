"""What ends a rank's process; layouts of real ranks are tested in test_layouts and test_faults."""

from __future__ import annotations

import subprocess
import sys

LEAVES = """
import threading, time
from nemotron.steps._training.distributed import leave_process
threading.Thread(target=time.sleep, args=(60,)).start()
print("last words", end="")
leave_process(75)
"""


def test_a_rank_ends_with_its_exit_code_whatever_its_threads_do() -> None:
    command = [sys.executable, "-c", LEAVES]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (run.returncode, run.stdout) == (75, "last words"), run.stderr
