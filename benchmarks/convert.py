"""Convert, merge and verify a 2 GB model against copying its bytes, PEFT's own merge and sha256.

    python benchmarks/convert.py [--layers 16] [--rounds 3] [--keep DIR]

Each side runs in a process of its own, in the same run, files in the page cache; wall and CPU
seconds and peak memory are those above a process that only imports the same modules. Every round
has all sides, one after the other; the best of each counts, the copy's as well.
Copying is ``shutil.copyfile`` and fsync of every file. On a machine that does other things the CPU
seconds are what to compare.

A virtual machine may give memory that is free for two seconds back to its host. Where that is so,
taking it again for the pages of a new file costs two seconds per GB, more than all else. So that no
side pays for it, 6 GiB (a quarter of a small machine) are held in memory until a side has imported
what it needs, and are free when its clock starts. No side meets an output of the round before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

HIDDEN, FFN, HEADS, GROUPS, VOCAB, RANK = 2048, 8192, 16, 4, 32000, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IMPORT_OURS = "import nemotron.steps.convert.merge_lora.step"
IMPORT_PEFT = "import torch; from peft import PeftModel; from transformers import LlamaForCausalLM"
PEFT_MERGE = """
base = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
VERIFY = """
from pathlib import Path
from nemotron.artifacts import read_artifact, verify_files
root = Path(sys.argv[1])
verify_files(root, read_artifact(root, "checkpoint_megatron"))
"""
# The same files and threads, the largest file first.
SHA256 = """
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
def digest(path):
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
files = [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
with ThreadPoolExecutor(min(8, os.cpu_count())) as threads:
    list(threads.map(digest, sorted(files, key=lambda path: -path.stat().st_size)))
"""
HOLD = """
import mmap, os, time
memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
held = mmap.mmap(-1, min(6 << 30, memory // 4))
if hasattr(mmap, "MADV_HUGEPAGE"):
    held.madvise(mmap.MADV_HUGEPAGE)
for start in range(0, len(held), 4096):
    held[start] = 1
print("held", flush=True)
time.sleep(3600)
"""
# A side says that it is ready, and waits until its clock starts.
CHILD = """
import os, sys
{imports}
ready, go = int(sys.argv.pop(1)), int(sys.argv.pop(1))
os.write(ready, b"1")
os.read(go, 1)
{work}
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
        run_in_child("import convert", f"convert.build({str(root)!r}, {arguments.layers})")
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
    hf, adapter, peft = root / "hf", root / "adapter", root / "peft"
    to_megatron = {"hf_model_path": hf, "output_dir": root / "megatron"}
    to_hf = {"megatron_path": root / "megatron", "output_dir": root / "back"}
    merge = {
        "backend": "hf_peft",
        "lora_checkpoint": adapter,
        "base_hf_path": hf,
        "output_hf_path": root / "merged",
        "allow_unverified_base": True,
    }
    for output in ("copy", "megatron", "back", "merged", "peft"):
        shutil.rmtree(root / output, ignore_errors=True)
    copied = ["convert.copy(sys.argv[1], sys.argv[2])", str(hf), str(root / "copy")]
    return {
        "copy": run_in_child("import convert", *copied),
        "import ours": run_in_child(IMPORT_OURS),
        "import peft": run_in_child(IMPORT_PEFT),
        "hf -> megatron": run_step(root, "convert.hf_to_megatron", to_megatron),
        "verify megatron": run_in_child(IMPORT_OURS, VERIFY, str(root / "megatron")),
        "the same, by sha256": run_in_child(IMPORT_OURS, SHA256, str(root / "megatron")),
        "megatron -> hf": run_step(root, "convert.megatron_to_hf", to_hf),
        "merge, verified": run_step(root, "convert.merge_lora", merge),
        "peft merge_and_unload": run_in_child(
            IMPORT_PEFT, PEFT_MERGE, str(hf), str(adapter), str(peft)
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


def copy(source: str, target: str) -> None:
    """Copy a directory's weights, onto the disk at the end."""
    Path(target).mkdir()
    for path in Path(source).glob("*.safetensors"):
        copied = shutil.copyfile(path, Path(target) / path.name)
        with copied.open("rb") as stream:
            os.fsync(stream.fileno())


def run_step(root: Path, name: str, values: dict[str, Any]) -> Cost:
    """Run a step with a config."""
    path = root / f"{name}.json"
    path.write_text(json.dumps(values, default=str), encoding="utf-8")  # JSON is YAML
    module = f"nemotron.steps.{name}.step"
    return run_in_child(f"import {module}", f"{module}.main()", "--config", str(path))


def run_in_child(imports: str, work: str = "", *arguments: str) -> Cost:
    """Run one Python process; its peak memory is that of the process, in MB.

    The clock runs while ``work`` is done, CPU seconds and peak are those of the whole process.
    """
    (hears_ready, ready), (hears_go, go) = os.pipe(), os.pipe()
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = CHILD.format(imports=imports, work=work)
    with tempfile.TemporaryFile() as said:
        with held_memory():
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(ready), str(hears_go), *arguments],
                env=environment,
                pass_fds=(ready, hears_go),
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            os.close(ready)
            os.read(hears_ready, 1)
        start = time.perf_counter()
        os.write(go, b"1")
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        for descriptor in (hears_ready, hears_go, go):
            os.close(descriptor)
        if status:
            said.seek(0)
            raise SystemExit(f"{[imports, work, *arguments]} failed:\n{said.read().decode()}")
    # Linux counts KiB, macOS bytes.
    peak_mb = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3 / 1.024)
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak_mb)


@contextlib.contextmanager
def held_memory() -> Iterator[None]:
    """Have a process hold the memory that a side will use, until the block ends."""
    hears, tells = os.pipe()
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=tells) as holder:
        os.read(hears, 1)
        yield
        holder.kill()
    os.close(hears)
    os.close(tells)


if __name__ == "__main__":
    main()
