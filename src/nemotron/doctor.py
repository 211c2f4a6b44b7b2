"""Examines what this machine has for runs, without importing torch, which may be missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemotron.packages import JOB_PACKAGES
from nemotron.processes import available_cores

_RUNTIMES = ("enroot", "docker", "podman", "apptainer", "singularity")
_TIMEOUT_SECONDS = 20
_GIB = 2**30
_LITTLE_DISK = 20 * _GIB  # base, packs and the merge of a model of a few billion parameters


@dataclass(frozen=True)
class Finding:
    """One finding: ``failed`` if no run works because of it, ``warn`` if some runs do not."""

    status: Literal["ok", "warn", "failed"]
    text: str
    fix: str = ""


def examine(output: Path) -> list[Finding]:
    """Return what this machine has, and what it lacks with a fix.

    Args:
        output: Directory that runs would write to; it need not be there.
    """
    return [
        Finding("ok", f"Python {platform.python_version()} at {sys.executable}"),
        *_packages(),
        *_gpus(),
        *_launchers(),
        _slurm(),
        _containers(),
        *_resources(output),
    ]


def _packages() -> Iterator[Finding]:
    missing = [p for module, p in JOB_PACKAGES.items() if importlib.util.find_spec(module) is None]
    for package in missing:
        yield Finding("failed", f"{package} is not installed", f"python -m pip install {package}")
    if not missing:
        yield Finding("ok", "all packages that the steps need")


def _gpus() -> Iterator[Finding]:
    names = re.findall(r"(?m)^GPU \d+: (.*?)(?: \(UUID.*)?$", _said("nvidia-smi", "-L"))
    found = f"{len(names)} GPU(s): {', '.join(dict.fromkeys(names))}" if names else "no NVIDIA GPU"
    version = _version("torch")
    if version is None:
        yield Finding("ok", found)
        return
    cuda = _cuda_of_torch()
    yield Finding("ok", f"torch {version}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}")
    if names and cuda is None:
        fix = "install torch for CUDA: https://pytorch.org/get-started/locally"
        yield Finding("warn", f"{found}, which this torch cannot use", fix)
    else:
        yield Finding("ok", found if names else f"{found}; runs on this host use the CPU")


def _cuda_of_torch() -> str | None:
    """Return the CUDA version that torch was built for, from its ``version.py``; None for none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"(?m)^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text)
    return found[1] if found else None


def _launchers() -> Iterator[Finding]:
    nemo_run, leptonai = _version("nemo_run"), _version("leptonai")
    if nemo_run is None:
        fix = "python -m pip install 'nemo_run>=0.11.1,<0.12' 'leptonai>=0.26.6,<0.28'"
        yield Finding("warn", "nemo-run is not installed; no job can be submitted", fix)
        return
    fix = "python -m pip install 'leptonai>=0.26.6,<0.28'"
    if leptonai is None:
        text = f"nemo-run {nemo_run} lacks leptonai, which it imports; no job can be submitted"
        yield Finding("warn", text, fix)
        return
    yield Finding("ok", f"nemo-run {nemo_run}, leptonai {leptonai}")
    if not _has_lepton_v1():
        yield Finding("warn", f"leptonai {leptonai} lacks modules that nemo-run imports", fix)


def _has_lepton_v1() -> bool:
    """Return whether leptonai has the modules that nemo-run imports, without importing it."""
    spec = importlib.util.find_spec("leptonai")
    places = (spec.submodule_search_locations or []) if spec else []
    return any((Path(place) / "api" / "v1").is_dir() for place in places)


def _slurm() -> Finding:
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        return Finding(
            "ok", 'no Slurm on this host; a profile reaches one elsewhere with tunnel = "ssh"'
        )
    version = _said("sbatch", "--version").strip()
    if not _said("sinfo", "--noheader", "--format=%R").strip():
        fix = "run sinfo to see the error; SLURM_CONF selects the cluster"
        return Finding("warn", f"{version or 'Slurm'}: its controller does not answer", fix)
    return Finding("ok", f"{version} answers")


def _containers() -> Finding:
    found = [name for name in _RUNTIMES if shutil.which(name)]
    return Finding("ok", f"containers: {', '.join(found) or 'none; runs on this host need none'}")


def _resources(output: Path) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", f"{available_cores()} core(s), {memory / _GIB:.0f} GiB of memory")
    place = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    if not os.access(place, os.W_OK):
        yield Finding(
            "failed", f"{place} is not writable", "work in a directory that you may write to"
        )
        return
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.0f} GiB free at {place.absolute()}"
    if free < _LITTLE_DISK:
        yield Finding("warn", f"only {text}", "free space, or write outputs to another disk")
    else:
        yield Finding("ok", text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str:
    """Return what a program prints; nothing if it does not exist, fails or hangs."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
