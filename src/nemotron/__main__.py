"""``python -m nemotron``, and the ``nemotron`` command."""

import sys

from nemotron.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
