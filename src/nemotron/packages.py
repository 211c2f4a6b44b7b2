"""Names the packages that a job lacks; ``launch.sh`` runs it if a job failed without an error.

It imports nothing that could itself be missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

from nemotron.errors import ExitCode, NemotronError

# Modules that the steps import at their start, and the packages that provide them.
JOB_PACKAGES = {
    "blake3": "blake3",
    "jinja2": "jinja2",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "xxhash": "xxhash",
    "yaml": "pyyaml",
}


def main() -> int:
    """Report an error if packages are missing; return its exit code, or 0."""
    missing = [
        package
        for module, package in JOB_PACKAGES.items()
        if importlib.util.find_spec(module) is None
    ]
    if not missing:
        return int(ExitCode.OK)
    error = NemotronError(
        "package_missing",
        f"the job's Python {platform.python_version()} has no {', '.join(missing)}",
        where=sys.executable,
        why="only nemotron itself is shipped; its dependencies come from the image",
        fix="choose another container_image, or add to the profile's startup_commands: "
        f"python -m pip install {' '.join(missing)}",
        exit_code=ExitCode.PREFLIGHT,
    )
    print(error, file=sys.stderr)
    if path := os.environ.get("NEMOTRON_ERROR_FILE"):
        Path(path).write_text(json.dumps(error.to_dict()), encoding="utf-8")
    return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
