"""The LoRA core against PEFT + transformers on one machine's CPU: seconds and memory per step.

The same random Llama, the same adapter on all seven projections, the same tokens and AdamW on both
sides, at tensor-parallel size 1 and 2 under gloo (past which ours share memory), one thread a rank,
fp32; ours at size 2 as it is by default, with the sequence split, and without:

* equal work: documents of one length, every token trained;
* packed chats: rows of real conversations, where documents end and only answers are trained.

Both sides' first losses agree, or the figures mean nothing; later ones drift apart, because here
the parts of a fused linear (q, k and v; gate and up) share one lora_a. Floors of the same shapes
say how far it could go: the base's GEMMs; those, attention and the adapters' GEMMs; and those and
the collectives. Ours and they take turns step by step, so that a machine whose speed changes by the
minute changes them alike.

    python benchmarks/lora_tp.py [--chats FILE] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections import defaultdict
from pathlib import Path

import torch
from lora.case import Shape, packed_chats, unmasked, write_case
from lora.sides import machine, run_side

ROOT = Path(__file__).parent

# The newest pair whose tensor-parallel forward works: 0.21.2 with transformers 5.21 and later
# raises in every row-parallel target.
PEERS = ("peft==0.20.0", "transformers==5.12.1")
SHAPE = Shape(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=8192,
    dim=16,
)
FLOORS = ("gemms", "work", "sent")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA core against PEFT")
    parser.add_argument("--chats", type=Path, default=ROOT.parent / "steps/_tiny/chat.jsonl")
    parser.add_argument("--rounds", type=int, default=3, help="the sides take turns this often")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a turn")
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    arguments = parser.parse_args()
    peers = install_peers()
    print(f"{machine()}; peers: {', '.join(PEERS)}", flush=True)
    report = {}
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            "equal work: 4 documents of 256, all tokens trained": unmasked(
                4, 256, SHAPE.vocab_size
            ),
            f"packed chats: {arguments.chats.name}, rows of 1024": packed_chats(
                arguments.chats, pack_size=1024, rows=4, scratch=Path(scratch)
            ),
        }
        for number, (title, micro_batches) in enumerate(cases.items()):
            case = Path(scratch) / f"case-{number}"
            write_case(case, SHAPE, micro_batches)
            for tensor_parallel in (1, 2):
                print(f"\n{title}, TP {tensor_parallel}", flush=True)
                figures = compare(case, peers, tensor_parallel, arguments.rounds, arguments.steps)
                report[f"{title}, TP {tensor_parallel}"] = figures
                show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(
    case: Path, peers: Path, tensor_parallel: int, rounds: int, steps: int
) -> dict[str, Figures]:
    """Run the sides in turns and return the best figures of each (the worst rank's)."""
    turns = defaultdict(list)
    own = Path(sys.executable)
    scripts = [(own, ["ours.py", "--floors"]), (peers, ["peft_transformers.py"])]
    ours = ["ours"]
    if tensor_parallel > 1:
        scripts.append((own, ["ours.py", "--floors", "--no-sequence-parallel"]))
        ours.append("ours-whole")
    beside = [f"{side} {each}" for side in ours for each in ("beside floors", *FLOORS)]
    sides = [*ours, "peft", *beside]
    for _ in range(rounds):
        for python, (script, *flags) in scripts:
            options = ["--steps", str(steps), "--tensor-parallel", str(tensor_parallel), *flags]
            run_side(case, python, script, options, num_ranks=tensor_parallel, on_gpu=False)
        for side in sides:
            of_ranks = [json.loads(path.read_text()) for path in case.glob(f"{side}.*.json")]
            turns[side].append({key: max(each[key] for each in of_ranks) for key in of_ranks[0]})
    return {
        side: {key: min(turn[key] for turn in got) for key in got[0]} for side, got in turns.items()
    }


def install_peers() -> Path:
    """Return the Python of an environment with the peers' releases, made where it is not there."""
    directory = ROOT / ".peers"
    python = directory / "bin" / "python"
    stamp = directory / "installed.txt"
    wanted = [f"torch=={torch.__version__.split('+', maxsplit=1)[0]}", *PEERS]
    if not stamp.exists() or stamp.read_text(encoding="utf-8").split() != wanted:
        print(f"installing {' '.join(wanted)} into {directory}", flush=True)
        venv.create(directory, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python


def show(figures: dict[str, Figures]) -> None:
    """Print a row a side, and the ratios."""
    print(f"{'':28}{'CPU s/step':>12}{'wall s/step':>12}{'MB above model':>16}{'loss':>22}")
    names = {
        "ours gemms": "floor: base GEMMs",
        "ours work": "floor: + attention, adapters",
        "ours sent": "floor: + collectives",
        "ours beside floors": "nemotron, in turns with them",
        "ours": "nemotron",
        "ours-whole": "nemotron, without SP",
        "peft": "PEFT + transformers",
    }
    for side in [side for side in names if side in figures]:
        name, each = names[side], figures[side]
        cells = f"{each['cpu_seconds']:12.3f}{each['seconds']:12.3f}"
        if "first_loss" in each:
            losses = f"{each['first_loss']:.6f} -> {each['last_loss']:.6f}"
            cells += f"{each['peak_mb']:16.0f}{losses:>22}"
        print(f"{name:28}{cells}")
    for side in ("ours", "ours-whole"):
        if side in figures:
            print(f"{names[side]}: {compared(side, figures)}")


def compared(side: str, figures: dict[str, Figures]) -> str:
    """Return what a side of ours is beside PEFT and the floors."""
    ours, peft, beside = figures[side], figures["peft"], figures[f"{side} beside floors"]
    of_work, of_sent = (
        beside["cpu_seconds"] / figures[f"{side} {floor}"]["cpu_seconds"] for floor in FLOORS[1:]
    )
    return (
        f"{peft['cpu_seconds'] / ours['cpu_seconds']:.2f}x as fast as PEFT with "
        f"{ours['peak_mb'] / peft['peak_mb']:.2f}x the memory, takes {of_work:.2f}x the second "
        f"floor, {of_sent:.2f}x the third"
    )


if __name__ == "__main__":
    main()
