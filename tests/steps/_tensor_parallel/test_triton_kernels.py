"""Triton's kernels against torch's operations, and as programs for GPUs (kernels_worker.py).

The worker needs settings of Triton that hold for a whole process. Where there is no GPU, Triton's
interpreter runs the kernels, program by program. It cannot round to bf16; fp16 stands in for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.steps._tensor_parallel.kernels import kernels_for

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

WORKER = Path(__file__).with_name("kernels_worker.py")
CORE = "nemotron.steps._tensor_parallel"
KERNELS = {
    "_rms_norm",
    "_rms_norm_gradient",
    "_swiglu",
    "_swiglu_gradient",
    "_rotate",
    "_softmax_statistics",
    "_softmax_minus_onehot",
}
# Sums of up to 5,000 fp32 numbers in another order: some roundings (6e-8) of the largest value; and
# the same through two layers and back.
ROUNDING = 5e-7
ROUNDING_OF_TRAINING = 5e-6
# Results in fp16 are the same numbers, but where an fp32 result lies on the edge between two of
# them: then one unit in the last place (2^-10), in values that are not the largest.
ROUNDING_IN_HALF = 2.0**-10


def run_worker(directory: Path, mode: str, *arguments: str, interpret: bool = False) -> Any:
    report = directory / "report.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory / "cache")}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(WORKER), mode, str(report), *arguments]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("compare")
    return run_worker(directory, "compare", interpret=not torch.cuda.is_available())


@pytest.mark.parametrize(
    "part", ["norm", "swiglu", "queries", "keys", "values", "heads gradient", "softmax"]
)
def test_kernels_compute_what_torch_does(differences: dict[str, Any], part: str) -> None:
    of_part = {name: value for name, value in differences.items() if name.startswith(part)}
    assert len(of_part) >= 8
    wide = [value for name, value in of_part.items() if name.endswith("float32")]
    half = [value for name, value in of_part.items() if name.endswith("float16")]
    assert max(wide) <= ROUNDING, of_part
    assert max(half) <= ROUNDING_IN_HALF, of_part


def test_kernels_round_where_torch_does(differences: dict[str, Any]) -> None:
    shares = [value for name, value in differences.items() if name.startswith("unequal share")]
    assert len(shares) >= 20
    # Of 9,000 numbers, 8 lie on an edge. A rounding left out changes a seventh of them.
    assert max(shares) <= 0.01


def test_a_logit_that_is_not_finite_makes_the_loss_so(differences: dict[str, Any]) -> None:
    assert differences["finite losses of logits that are not"] == 0


def test_training_runs_every_kernel_and_has_the_loss_and_gradients_of_torch(
    differences: dict[str, Any],
) -> None:
    assert set(differences["launched"]) == KERNELS
    assert differences["training loss"] <= ROUNDING
    assert differences["training gradients"] <= ROUNDING_OF_TRAINING


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles_for_a_gpu_and_moves_sixteen_bytes_at_a_time(
    tmp_path: Path, capability: str
) -> None:
    built = run_worker(tmp_path, "build", capability)
    assert {name for name, _ in built} == KERNELS
    for name, ptx in built:
        loads = [line for line in ptx.splitlines() if "ld.global" in line]
        assert any(".v4.b32" in line for line in loads), name
        assert ".local" not in ptx, f"{name} does not fit in registers"


def test_without_a_gpu_torch_computes() -> None:
    assert kernels_for(torch.zeros(1)) is None


def test_a_host_on_which_triton_does_not_work_trains_without_it_and_says_so(
    tmp_path: Path,
) -> None:
    script = f"import torch; from {CORE}.kernels import _working_kernels as kernels; "
    script += "print([kernels(torch.device('cpu')) for _ in range(2)])"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "RANK": "0"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "[None, None]\n"
    (line,) = [each for each in run.stderr.splitlines() if each.startswith("warning:")]
    assert "training is slower, because Triton does not work on this host" in line
