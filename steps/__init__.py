"""The step catalogue: what runs inside a job. A leaf directory with a step.toml is a step.

A job spends its first seconds importing. The launcher reports a Ctrl-C during that time, and a
traceback through the imports of other packages would add nothing.
"""

import os
import sys
from types import TracebackType


def _leave_interrupts_to_the_launcher(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


if "NEMOTRON_ERROR_FILE" in os.environ:  # this process is a job's
    sys.excepthook = _leave_interrupts_to_the_launcher
