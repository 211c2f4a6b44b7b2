"""Running the sides of a case, and saying on what machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def run_side(
    case: Path,
    python: Path,
    script: str,
    options: Sequence[str],
    *,
    num_ranks: int,
    on_gpu: bool,
) -> None:
    """Run the ranks of one side, a script of this directory, to their end."""
    command = [str(python), "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1"]  # else a name that does not resolve is waited for
    command += [
        "--nproc-per-node",
        str(num_ranks),
        str(Path(__file__).with_name(script)),
        str(case),
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def machine() -> str:
    """Return what the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
