"""The LoRA core against PEFT + transformers on one GPU: speed, memory, and share of the ceiling.

The same random Llama in bf16, the same adapter on all seven projections, rows of 4,096 packed
tokens and AdamW on both sides, in the same run. The ceiling is what a bf16 GEMM of 8,192 x 8,192
reaches on this GPU; a side's share counts the operations of the mathematics only (``lora_flops``).

    python benchmarks/lora_gpu.py [--shape 1b|8b|tiny] [--attention sdpa] [--json FILE]

``--shape tiny`` also runs without a GPU, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from lora.case import Shape, packed_documents, write_case
from lora.sides import machine, run_side

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._models.layouts import LORA_TARGETS
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.flops import lora_flops

# Hidden, FFN, layers, heads, key/value heads, vocabulary, LoRA rank: of Llama 3.2 1B and 3.1 8B.
SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 256, 4),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, 16),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256, 16),
}
ROW_TOKENS, NUM_ROWS = 4096, 2
GEMM_SIZE = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA on a GPU against PEFT + transformers")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append")
    parser.add_argument("--rounds", type=int, default=2, help="the sides take turns this often")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a turn")
    parser.add_argument(
        "--attention", default="sdpa", help="of transformers, such as flex_attention"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    arguments = parser.parse_args()
    names = arguments.shape or ["1b", "8b"]
    if not torch.cuda.is_available() and names != ["tiny"]:
        raise SystemExit("no GPU is visible; --shape tiny alone runs without one")
    ceiling = gemm_ceiling()
    print(f"{machine()}; bf16 GEMM ceiling {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    report = {name: measure(name, arguments, ceiling) for name in names}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    name: str, arguments: argparse.Namespace, ceiling: float
) -> dict[str, dict[str, float]]:
    """Run both sides on one shape, print and return their best figures."""
    shape = SHAPES[name]
    row_tokens = ROW_TOKENS if name != "tiny" else 256
    micro_batches = packed_documents(NUM_ROWS, row_tokens, shape.vocab_size)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        case = Path(scratch)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_case(case, shape, micro_batches, dtype=torch.bfloat16, device=device)
        operations = step_operations(case, shape.dim, micro_batches)
        for _ in range(arguments.rounds):
            for side, script in (("ours", "ours.py"), ("peft", "peft_transformers.py")):
                options = ["--steps", str(arguments.steps), "--dtype", "bfloat16"]
                if side == "peft":
                    options += ["--attention", arguments.attention]
                run_side(case, Path(sys.executable), script, options, num_ranks=1, on_gpu=True)
                got = json.loads((case / f"{side}.0.json").read_text(encoding="utf-8"))
                if side not in figures or got["seconds"] < figures[side]["seconds"]:
                    figures[side] = got
    for side, each in figures.items():
        each["tokens_per_second"] = NUM_ROWS * row_tokens / each["seconds"]
        each["share_of_ceiling"] = operations / each["seconds"] / ceiling
        print(
            f"{name:5}{side:6}{each['tokens_per_second']:12,.0f} tokens/s"
            f"{each['peak_mb']:12,.0f} MB above the model{each['share_of_ceiling']:8.1%} of the "
            f"ceiling   loss {each['first_loss']:.4f} -> {each['last_loss']:.4f}",
            flush=True,
        )
    ours, peft = figures["ours"], figures["peft"]
    speed = ours["tokens_per_second"] / peft["tokens_per_second"]
    memory = ours["peak_mb"] / peft["peak_mb"]
    print(f"{name}: nemotron is {speed:.2f}x as fast with {memory:.2f}x the memory", flush=True)
    return figures


def step_operations(case: Path, dim: int, micro_batches: list[dict[str, list[int]]]) -> float:
    """Return the floating-point operations that the mathematics of a step takes."""
    values = json.loads((case / "model" / "config.json").read_text(encoding="utf-8"))
    lora = LoraTargets(tuple(LORA_TARGETS), LoraSpec(dim, 2.0 * dim))
    flops = lora_flops(DecoderConfig.from_hf(values), lora)
    return sum(flops.of(each["cu_seqlens"], len(each["labels"])) for each in micro_batches)


def gemm_ceiling() -> float:
    """Return the operations per second of the fastest of ten large bf16 GEMMs."""
    if not torch.cuda.is_available():
        return float("inf")
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").bfloat16() for _ in range(2))
    fastest = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - started)
    return 2.0 * GEMM_SIZE**3 / fastest


if __name__ == "__main__":
    main()
