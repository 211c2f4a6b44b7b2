"""Convert and merge a 2 GB model against copying the same bytes, and against PEFT's own merge.

    python benchmarks/convert.py [--layers 16] [--rounds 3] [--keep DIR]

Each side runs in a process of its own, in the same run, files in the page cache; wall and CPU
seconds and peak memory are those above a process that only imports the same modules. Every round
has all sides, one after the other; the best of each counts, the copy's as well.
Copying is ``shutil.copyfile`` and fsync of every file. On a machine that does other things the CPU
seconds are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

HIDDEN, FFN, HEADS, GROUPS, VOCAB, RANK = 2048, 8192, 16, 4, 32000, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IMPORT_OURS = "import nemotron.steps.convert.merge_lora.step"
IMPORT_PEFT = "import peft, torch, transformers; from transformers import LlamaForCausalLM"
PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def main() -> None:
    """Build the inputs, time every side, print the table."""
    parser = argparse.ArgumentParser(description="convert and merge against copy and PEFT")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="work there and keep it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root: Path = arguments.keep or Path(made)
        root.mkdir(parents=True, exist_ok=True)
        call = f"import convert; convert.build({str(root)!r}, {arguments.layers})"
        run_in_child(["-c", call])
        measure(root, arguments.rounds)


def build(root: str, layers: int) -> None:
    """Write a random bf16 base and a random adapter for it, in PEFT's layout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(Path(root) / "hf")
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(Path(root) / "adapter"))


def measure(root: Path, num_rounds: int) -> None:
    """Run every side in every round and print the best of each."""
    size_gb = sum(path.stat().st_size for path in (root / "hf").glob("*.safetensors")) / 1e9
    largest = VOCAB * HIDDEN * 2 / 1e6
    rounds = [run_sides(root) for _ in range(num_rounds)]
    best = {name: Cost.best([costs[name] for costs in rounds]) for name in rounds[0]}
    ours, theirs = best.pop("import ours"), best.pop("import peft")
    copied = best["copy"].wall
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{size_gb:.2f} GB of weights, largest tensor {largest:.0f} MB, best of {num_rounds}")
    print(f"{'':24} {'wall s':>8} {'x copy':>7} {'cpu s':>7} {'peak MB':>8} {'- largest':>9}")
    for name, whole in best.items():
        cost = whole - (theirs if "peft" in name else Cost() if name == "copy" else ours)
        row = f"{name:24} {cost.wall:8.1f} {cost.wall / copied:7.1f} {cost.cpu:7.1f}"
        has_peak = cost.peak_mb > 0
        print(row + (f" {cost.peak_mb:8.0f} {cost.peak_mb - largest:9.0f}" if has_peak else ""))


def run_sides(root: Path) -> dict[str, Cost]:
    """Run every side once."""
    hf, adapter = root / "hf", root / "adapter"
    to_megatron = {"hf_model_path": hf, "output_dir": root / "megatron"}
    to_hf = {"megatron_path": root / "megatron", "output_dir": root / "back"}
    merge = {
        "backend": "hf_peft",
        "lora_checkpoint": adapter,
        "base_hf_path": hf,
        "output_hf_path": root / "merged",
        "allow_unverified_base": True,
    }
    return {
        "copy": copy(hf, root / "copy"),
        "import ours": run_in_child(["-c", IMPORT_OURS]),
        "import peft": run_in_child(["-c", IMPORT_PEFT]),
        "hf -> megatron": run_step(root, "convert.hf_to_megatron", to_megatron),
        "megatron -> hf": run_step(root, "convert.megatron_to_hf", to_hf),
        "merge, verified": run_step(root, "convert.merge_lora", merge),
        "peft merge_and_unload": run_in_child(
            ["-c", PEFT_MERGE, str(hf), str(adapter), str(root / "peft")]
        ),
    }


@dataclass(frozen=True)
class Cost:
    """What a side takes: seconds of the wall and of the CPU, peak memory in MB."""

    wall: float = 0.0
    cpu: float = 0.0
    peak_mb: float = 0.0

    @classmethod
    def best(cls, costs: Sequence[Cost]) -> Cost:
        """Return the least of each."""
        columns = zip(*(astuple(cost) for cost in costs), strict=True)
        return cls(*(min(column) for column in columns))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu, self.peak_mb - other.peak_mb)


def copy(source: Path, target: Path) -> Cost:
    """Copy a directory's weights, onto the disk at the end."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    start, cpu = time.perf_counter(), time.process_time()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return Cost(time.perf_counter() - start, time.process_time() - cpu)


def run_step(root: Path, module: str, values: dict[str, Any]) -> Cost:
    """Run a step with a config."""
    path = root / f"{module}.json"
    path.write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    return run_in_child(["-m", f"nemotron.steps.{module}.step", "--config", str(path)])


def run_in_child(arguments: list[str]) -> Cost:
    """Run one Python process; its peak memory is that of the process, in MB."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed")
    # Linux counts KiB, macOS bytes.
    peak_mb = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak_mb)


if __name__ == "__main__":
    main()
