"""nemotron.doctor: what is said of this machine, as it is, and of one that lacks something."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nemotron
from nemotron import doctor
from nemotron.cli.app import main

SOURCE = Path(nemotron.__file__).parents[1]


def test_this_machine_can_run_the_steps(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"ok       Python {platform.python_version()} at {sys.executable}\n" in text
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    assert f"ok       torch {torch.__version__}, built for {built}\n" in text
    assert f"{len(os.sched_getaffinity(0))} core(s)" in text
    assert f" free at {here}\n" in text
    assert main(["doctor", "--json"]) == 0
    statuses = [finding["status"] for finding in json.loads(capsys.readouterr().out)]
    assert len(statuses) == len([line for line in text.splitlines() if "fix: " not in line])
    assert "failed" not in statuses


def test_a_machine_without_packages_is_told_without_them(here: Path) -> None:
    script = "from nemotron.doctor import examine; from pathlib import Path\n"
    script += "print(*(f'{f.status} {f.text}: {f.fix}' for f in examine(Path('x'))), sep='\\n')"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "failed torch is not installed: python -m pip install torch\n" in done.stdout
    assert "warn nemo-run is not installed; no job can be submitted: " in done.stdout


def test_gpus_that_torch_cannot_use_and_a_cluster_that_is_silent_are_warned_of(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = here / "bin"
    tools.mkdir()
    texts = {
        "nvidia-smi": 'for i in 0 1; do echo "GPU $i: NVIDIA H200 (UUID: x)"; done',
        "sbatch": "echo slurm 22.05.8",
        "srun": "true",
        "sinfo": "exit 1",
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: None)
    found = {finding.text: finding.status for finding in doctor.examine(here)}
    assert found["2 GPU(s): NVIDIA H200, which this torch cannot use"] == "warn"
    assert found["slurm 22.05.8: its controller does not answer"] == "warn"


def test_a_machine_without_leptonai_is_told_that_nothing_can_be_submitted(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nemo-run imports it for any submission, also to Slurm.
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "leptonai" else version(p))
    (found,) = [finding for finding in doctor.examine(here) if "leptonai" in finding.text]
    assert found.status == "warn"
    assert found.text.endswith(" lacks leptonai, which it imports; no job can be submitted")
    assert found.fix == "python -m pip install 'leptonai>=0.26.6,<0.28'"
