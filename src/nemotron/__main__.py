"""``python -m nemotron``, and the ``nemotron`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        from nemotron.cli import app
    except KeyboardInterrupt:  # the imports take a moment, in which nothing has begun yet
        return 130
    return app.main(argv)


if __name__ == "__main__":
    sys.exit(main())
