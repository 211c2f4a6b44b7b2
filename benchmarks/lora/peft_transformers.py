"""PEFT + transformers on a case: what their users would write, with the same optimizer.

Run by torchrun, in an environment with their releases: ``peft_transformers.py CASE --steps N``;
every rank writes ``CASE/peft.RANK.json``. Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import measure_steps, write_result
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = json.loads((arguments.case / "case.json").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    placed = {"tp_plan": "auto"} if arguments.tensor_parallel > 1 else {"device_map": device}
    base = AutoModelForCausalLM.from_pretrained(
        arguments.case / "model",
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attention,
        **placed,
    )
    model = PeftModel.from_pretrained(base, str(arguments.case / "adapter"), is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case["lr"])
    batches = [_inputs(each, device) for each in case["micro_batches"]]
    supervised = sum(int((labels >= 0).sum()) for _, labels in batches)

    def step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=device)  # read once: a GPU is waited for each time
        for inputs, labels in batches:
            logits = model(**inputs, use_cache=False).logits
            loss = F.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1, reduction="sum"
            )
            (loss / supervised).backward()
            total += loss.detach() / supervised
        optimizer.step()
        return float(total)

    result = measure_steps(step, num_steps=arguments.steps)
    write_result(arguments.case, "peft", int(os.environ.get("RANK", "0")), result)


def _inputs(values: dict[str, Any], device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Documents of one length as a batch; others as one row whose positions restart at each."""
    lengths = [stop - start for start, stop in pairwise(values["cu_seqlens"])]
    tokens, labels = (torch.tensor(values[key], device=device) for key in ("tokens", "labels"))
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0])
        return {"input_ids": tokens.view(shape)}, labels.view(shape)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return {"input_ids": tokens[None], "position_ids": positions[None]}, labels[None]


if __name__ == "__main__":
    main()
