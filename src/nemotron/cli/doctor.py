"""``nemotron doctor``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nemotron import doctor
from nemotron.cli.options import Debug, Json
from nemotron.errors import ExitCode

OUTPUT = Path("output")  # where the configs of the steps write


def show_machine(as_json: Json = False, debug: Debug = False) -> int:
    """Show what this machine has for runs, and a fix for what is missing."""
    findings = doctor.examine(OUTPUT)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.status:<8} {finding.text}")
            if finding.fix:
                print(f"{'':<8} fix: {finding.fix}")
    is_unfit = any(finding.status == "failed" for finding in findings)
    return int(ExitCode.PREFLIGHT if is_unfit else ExitCode.OK)
