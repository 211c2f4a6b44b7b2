"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors included.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")]
