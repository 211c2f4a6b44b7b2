"""``python -m nemotron``, and the ``nemotron`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    _open_standard_streams()
    try:
        from nemotron.cli import app
    except KeyboardInterrupt:  # the imports take a moment, in which nothing has begun yet
        return 130
    return app.main(argv)


def _open_standard_streams() -> None:
    """Open closed standard streams (``2>&-``) on /dev/null, before a file gets their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
