"""Where Triton's kernels take the place of torch's operations: on GPUs on which Triton works.

PyTorch for CUDA comes with Triton. It builds kernels when they are first called, which needs a C
compiler on the host and a GPU that it supports.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Return the module ``triton_kernels`` if it can compute on this tensor, otherwise None."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return None
    return _working_kernels(tensor.device)


@cache
def _working_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels, or None and a line on stderr if the simplest one does not work here."""
    try:
        from nemotron.steps._tensor_parallel import triton_kernels

        x = torch.ones(1, 8, device=device)
        triton_kernels.rms_norm(x, x[0], 1e-6, out=torch.empty_like(x))
    # Whatever stops Triton (no compiler, an old GPU, a full cache directory) only costs speed.
    except Exception as error:
        if os.environ.get("RANK", "0") == "0":
            reason = str(error).splitlines() or [type(error).__name__]
            print(
                f"warning: training is slower, because Triton does not work on this host "
                f"({reason[0]}); it needs a C compiler and a GPU that it supports",
                file=sys.stderr,
                flush=True,
            )
        return None
    return triton_kernels
