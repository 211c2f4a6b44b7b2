"""What came out of the four tiny steps: losses, places, answers and the loss curve.

Run as ``python -m nemotron.steps._tiny.show`` in the directory of the run; ``make quickstart`` ends
with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import plotext
import torch
from tokenizers import Tokenizer

from nemotron.artifacts import read_artifact
from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.generation import generate_greedily
from nemotron.steps._models.gpt import GPTModel
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tiny.corpus import END, START
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.run_directory import METRICS_FILE

TINY = Path(__file__).parent
MAX_NEW_TOKENS = 40


def main() -> None:
    """Print the summary and write the curve as PNG."""
    parser = argparse.ArgumentParser(description="show what the four tiny steps made")
    parser.add_argument("--output", type=Path, default=Path("output"), help="output directory")
    output = parser.parse_args().output
    training = output / "peft/megatron_bridge/tiny"
    merged = output / "convert/merge_lora/tiny/hf"
    events = read_events(training / METRICS_FILE)
    adapter = training / f"iter_{events[-1]['iteration']:07d}"
    png = training / "loss.png"
    draw_png(events, png)
    draw_terminal(events)
    show_answers(TINY / "model", merged)
    show_losses(adapter)
    print(f"adapter (PEFT)        {adapter}")
    print(f"merged checkpoint     {merged}")
    print(f"loss curve            {png}")


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(events: list[dict[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    """Return iterations and losses of one kind of event."""
    chosen = [event for event in events if event["event"] == kind]
    return [event["iteration"] for event in chosen], [event["lm_loss"] for event in chosen]


def draw_png(events: list[dict[str, Any]], path: Path) -> None:
    """Draw train and held-out loss over iterations into a PNG file."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*curve(events, "step"), label="train")
    axes.plot(*curve(events, "validation"), marker="o", label="held out")
    axes.set(xlabel="iteration", ylabel="loss per supervised token", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_terminal(events: list[dict[str, Any]]) -> None:
    """Draw the same in the terminal."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(90, 18)
    plotext.plot(*curve(events, "step"), label="train", marker="braille")
    plotext.scatter(*curve(events, "validation"), label="held out", marker="o")
    plotext.xlabel("iteration")
    plotext.ylabel("loss per supervised token")
    print(plotext.uncolorize(plotext.build()))


def show_answers(base: Path, merged: Path) -> None:
    """Print what both models answer to questions that are not in the training data."""
    tokenizer = Tokenizer.from_file(str(merged / "tokenizer.json"))
    models = {"base": load(base), "merged": load(merged)}
    for prompt in json.loads((TINY / "prompts.json").read_text(encoding="utf-8"))[:3]:
        print(f"\n  {prompt['messages'][-1]['content']}")
        for name, model in models.items():
            print(f"    {name:<8}{answer(model, tokenizer, prompt['messages'])}")
    print()


def answer(model: GPTModel, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """Return a model's answer on one line; an answer that does not end ends in dots."""
    turns = [f"{START}{each['role']}\n{each['content']}{END}\n" for each in messages]
    prompt = tokenizer.encode("".join(turns) + f"{START}assistant\n").ids
    (end_id,) = tokenizer.encode(END).ids
    ids = generate_greedily(model, prompt, end_id=end_id, max_new_tokens=MAX_NEW_TOKENS)
    ending = " ..." if len(ids) == MAX_NEW_TOKENS else ""
    return " ".join(tokenizer.decode(ids).split()) + ending


def load(directory: Path) -> GPTModel:
    """Return the model of a Hugging Face directory, on the CPU."""
    return load_base_model(
        AsMegatron(HuggingFaceCheckpoint(directory)),
        lora=None,
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def show_losses(adapter: Path) -> None:
    """Print the held-out loss before and after, as the adapter's manifest has it."""
    properties = read_artifact(adapter, "checkpoint_lora").properties
    before, after = properties["valid_loss_before"], properties["valid_loss"]
    fall = 100.0 * (1.0 - after / before)
    print(f"held-out loss         {before:.4f} -> {after:.4f}  ({fall:.1f} % lower)")


if __name__ == "__main__":
    main()
