"""Process of test_triton_kernels.py: Triton's kernels against torch's operations.

``kernels_worker.py compare REPORT`` computes on a GPU if there is one, and otherwise in Triton's
interpreter (TRITON_INTERPRET=1, set by the test). Every figure is a largest difference, relative to
the largest value of torch's result. ``kernels_worker.py build REPORT CAPABILITY`` compiles every
kernel for a GPU that need not be there, and reports the kernels' PTX.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from nemotron.steps._models import attention
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._models.layouts import LORA_TARGETS
from nemotron.steps._tensor_parallel import kernels, prologue, triton_kernels, vocabulary
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
USERS = prologue, vocabulary, attention  # modules that ask for kernels
Results = dict[str, Tensor]
GENERATOR = torch.Generator()


def compare() -> dict[str, Any]:
    """Return how far the kernels' results are from torch's, and which kernels training ran."""
    assert kernels._working_kernels(DEVICE) is triton_kernels
    figures: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16):
        for case in (norms, activations, rotations, losses):
            GENERATOR.manual_seed(0)
            with_torch = with_kernels(False, case, dtype)
            GENERATOR.manual_seed(0)
            for name, got in with_kernels(True, case, dtype).items():
                figures[f"{name} {str(dtype)[6:]}"] = difference(got, with_torch[name])
                if got.dtype == torch.float16:
                    share = (got != with_torch[name]).double().mean().item()
                    figures[f"unequal share of {name}"] = share
    GENERATOR.manual_seed(0)
    model = with_kernels(False, training, torch.float32)
    GENERATOR.manual_seed(0)
    launched: set[str] = set()
    launch = triton_kernels._launch

    def note_and_launch(kernel: Any, *arguments: Any, **sizes: int) -> None:
        launched.add(kernel.fn.__name__)
        launch(kernel, *arguments, **sizes)

    triton_kernels._launch = note_and_launch
    got = with_kernels(True, training, torch.float32)
    figures["launched"] = sorted(launched)
    figures["training loss"] = difference(got.pop("loss"), model.pop("loss"))
    figures["finite losses of logits that are not"] = num_finite_losses()
    figures["training gradients"] = max(difference(got[name], model[name]) for name in model)
    return figures


def with_kernels(
    is_used: bool, case: Callable[[torch.dtype], Results], dtype: torch.dtype
) -> Results:
    """Run a case with Triton's kernels, or with torch's operations."""
    for module in USERS:
        setattr(module, "kernels_for", lambda _: triton_kernels if is_used else None)  # noqa: B010
    return case(dtype)


def norms(dtype: torch.dtype) -> Results:
    """Norms of rows that lie apart, of sizes that are no power of two, and of short rows."""
    results = {}
    for rows, features in ((5, 96), (37, 24), (3, 3000)):
        x, weight = random(rows, features + 8, dtype=dtype)[:, 4:-4], random(features, dtype=dtype)
        norm = prologue.RMSNormPrologue(weight, 1e-5)
        out = torch.zeros(rows, features + 8, dtype=dtype, device=DEVICE)
        inv_rms = norm.apply(x, out=out[:, :-8])
        dy, added = random(rows, features, dtype=dtype), random(rows, features, dtype=dtype)
        results |= {
            f"norm {features}": out,  # and nothing is written beside the rows
            f"norm statistic {features}": inv_rms,
            f"norm gradient {features}": norm.gradient(dy.clone(), x, inv_rms),
            f"norm and residual {features}": norm.gradient(dy, x, inv_rms, None, added),
        }
    return results


def activations(dtype: torch.dtype) -> Results:
    """SwiGLU with and without what the backward pass has computed again."""
    x, dy = random(5, 3004, dtype=dtype)[:, :3000], random(5, 1500, dtype=dtype)
    dh = random(5, 8, dtype=dtype)
    out = torch.zeros(5, 1516, dtype=dtype, device=DEVICE)
    swiglu = prologue.SwiGLUPrologue()
    statistic = swiglu.apply(x, out=out[:, :1500])
    da, recomputed = swiglu.lora_a_gradient(dh, x, statistic, None)
    return {
        "swiglu": out,
        "swiglu lora_a gradient": da,
        "swiglu gradient": swiglu.gradient(dy.clone(), x, statistic, recomputed),
        "swiglu gradient alone": swiglu.gradient(dy, x, statistic),
    }


def rotations(dtype: torch.dtype) -> Results:
    """Queries and keys as they lie in the output of linear_qkv, and their gradients."""
    results = {}
    for groups, queries, head_dim in ((2, 3, 8), (3, 1, 24)):
        qkv = random(7, groups, queries + 2, head_dim, dtype=dtype).requires_grad_()
        angles = random(7, head_dim // 2, dtype=torch.float32)
        cos, sin = (table.to(dtype)[:, None, None] for table in (angles.cos(), angles.sin()))
        weight = random(head_dim, dtype=dtype)
        norm = prologue.RMSNormPrologue(weight, 1e-6)
        for norms in (None, attention.HeadNorms(norm, norm)):
            heads = attention.rotated_heads(qkv, (torch.cat([cos, cos], dim=-1), sin), norms)
            grads = [random(*each.shape, dtype=dtype) for each in heads]
            (dqkv,) = torch.autograd.grad(heads, qkv, grads)
            name = f"{head_dim} {'normed' if norms else 'plain'}"
            parts = ("queries", "keys", "values")
            results |= {f"{part} {name}": head for part, head in zip(parts, heads, strict=True)}
            results[f"heads gradient {name}"] = dqkv
    return results


def losses(dtype: torch.dtype) -> Results:
    """The softmax of one of two ranks' columns: some labels are on the other one."""
    logits = 4.0 * random(5, 5000, dtype=dtype)
    logits[1, 7] = 30000.0
    labels = torch.tensor([0, 7, -3, 4999, 5000], device=DEVICE)
    softmax = vocabulary._softmax(logits, labels)
    log_sum = softmax.statistics[0] + softmax.statistics[1].log() + 0.25
    names = "maximum", "exponentials", "label"
    return {
        **{f"softmax {name}": row for name, row in zip(names, softmax.statistics, strict=True)},
        "softmax gradient": softmax.minus_onehot(log_sum),
    }


def num_finite_losses() -> int:
    """Return how many of three rows have a finite loss, of which none has only finite logits."""
    logits = random(3, 5000, dtype=torch.float32)
    for row, value in enumerate(("nan", "inf", "-inf")):
        logits[row, 4100] = float(value)
    logits[2] = float("-inf")
    statistics = triton_kernels.softmax_statistics(logits, torch.tensor([0, 1, 2], device=DEVICE))
    return int((statistics[0] + statistics[1].log() - statistics[2]).isfinite().sum())


def training(dtype: torch.dtype) -> Results:
    """Loss and every gradient of a model with biases, head norms and a tied output layer."""
    config = DecoderConfig.from_hf(
        {
            "model_type": "qwen3",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": 99,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
    )
    lora = LoraTargets(tuple(LORA_TARGETS), LoraSpec(dim=4, alpha=8.0))
    model = GPTModel(config, lora=lora, group=ProcessGroup(), dtype=dtype)
    for tensor in (*model.buffers(), *model.parameters()):
        tensor.data.copy_(0.2 * random(*tensor.shape, dtype=tensor.dtype))
    model.to(DEVICE)
    tokens, labels = (torch.randint(0, 99, (23,), generator=GENERATOR).to(DEVICE) for _ in range(2))
    loss = model.loss(model(tokens, [0, 9, 10, 23]), labels).sum()
    loss.backward()
    gradients = {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE, dtype)


def difference(got: Tensor, wanted: Tensor) -> float:
    assert got.dtype == wanted.dtype
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


class AbsentGPU:
    """What Triton asks a driver before it compiles, answered for a GPU that need not be there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def build(capability: int) -> list[tuple[str, str]]:
    """Return name and PTX of every kernel that a 1B model's calls in bf16 and in fp32 ask for."""
    built: list[tuple[str, str]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **sizes)
        assert compiled.asm["cubin"]
        built.append((kernel.fn.__name__, compiled.asm["ptx"]))

    driver.set_active(AbsentGPU(capability))  # pyright: ignore[reportArgumentType]
    triton_kernels._launch = compile_only
    for dtype in (torch.bfloat16, torch.float32):
        call_every_kernel(dtype)
    return built


def call_every_kernel(dtype: torch.dtype) -> None:
    """Make the calls of a layer and of the loss; Llama 3.2 1B's sizes, and Qwen3's head norms."""
    tokens, hidden, ffn, groups, head_dim, vocabulary_size = 4, 2048, 8192, 8, 64, 128256
    zeros = partial(torch.zeros, dtype=dtype)
    x_h, weight = zeros(tokens, hidden + 16), zeros(hidden)
    x = x_h[:, :hidden]
    inv_rms = triton_kernels.rms_norm(zeros(tokens, hidden), weight, 1e-5, out=x)
    for added in (None, x):
        triton_kernels.rms_norm_gradient(x, x, inv_rms, weight, added)
    heads = zeros(tokens * groups, head_dim)
    triton_kernels.rms_norm(heads, heads[0], 1e-6, out=heads)
    fc1 = zeros(tokens, 2 * ffn)
    triton_kernels.swiglu(fc1, out=fc1[:, ffn:])
    triton_kernels.swiglu_gradient(fc1[:, ffn:], fc1, out=fc1)
    qkv, cos = zeros(tokens, groups, 6, head_dim), zeros(tokens, 1, 1, head_dim)
    for part in (qkv[:, :, :4], qkv[:, :, 4:5]):
        triton_kernels.rotate(part, cos, cos[..., : head_dim // 2], out=part.contiguous())
    logits, labels = zeros(tokens, vocabulary_size), torch.zeros(tokens, dtype=torch.int64)
    triton_kernels.softmax_statistics(logits, labels)
    triton_kernels.softmax_minus_onehot_(logits, torch.zeros(tokens), labels)


if __name__ == "__main__":
    mode, report, *rest = sys.argv[1:]
    result = compare() if mode == "compare" else build(int(rest[0]))
    Path(report).write_text(json.dumps(result), encoding="utf-8")
