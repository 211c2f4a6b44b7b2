"""A program of a test, in a process forked from one that has imported torch: see ``fork``.

``runpy`` runs it with a ``GIVEN`` among its globals: a ``program``, which is a file or a module,
its ``arguments``, its ``environment`` and the file for what it prints, ``output``.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from typing import Any

given: dict[str, Any] = globals()["GIVEN"]
os.environ.update(given["environment"])
sys.argv = [given["program"], *given["arguments"]]
output = os.open(given["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
for stream in (sys.stdout, sys.stderr):
    os.dup2(output, stream.fileno())
warnings.simplefilter("error", FutureWarning)
if given["program"].endswith(".py"):
    runpy.run_path(given["program"], run_name="__main__")
else:
    runpy.run_module(given["program"], run_name="__main__", alter_sys=True)
