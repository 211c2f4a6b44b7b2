"""This project's side of a case: the parts of its trainer that make an optimizer step.

Run by torchrun: ``ours.py CASE --steps N``; every rank writes ``CASE/ours.RANK.json``, with
``--no-sequence-parallel`` (``recipe.sequence_parallel=false``) ``CASE/ours-whole.RANK.json``. With
``--floors`` it then takes turns with the floors, and writes the seconds of each, such as
``CASE/ours beside floors.RANK.json`` and ``CASE/ours work.RANK.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from floors import floor_steps
from measure import measure_in_turns, measure_steps, write_result

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._models.layouts import LORA_TARGETS
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.batches import MicroBatch
from nemotron.steps._training.distributed import open_layout
from nemotron.steps._training.flat_adapter import FlatAdapter
from nemotron.steps._training.pipeline import PipelineStage, WeightedBatch
from nemotron.steps._training.trainer_state import load_adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--floors", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = json.loads((arguments.case / "case.json").read_text(encoding="utf-8"))
    with open_layout(
        tensor_model_parallel_size=arguments.tensor_parallel,
        pipeline_model_parallel_size=1,
        data_parallel_size=1,
        timeout_minutes=5,
    ) as layout:
        reader = AsMegatron(HuggingFaceCheckpoint(arguments.case / "model"))
        model = load_base_model(
            reader,
            lora=LoraTargets(tuple(LORA_TARGETS), LoraSpec(case["dim"], case["alpha"])),
            group=layout.tensor,
            dtype=getattr(torch, arguments.dtype),
            device=layout.device,
            sequence_parallel=arguments.sequence_parallel,
        )
        stage = PipelineStage([model], group=layout.pipeline, device=layout.device)
        load_adapter(arguments.case / "adapter", stage)
        adapter = FlatAdapter(
            (each for linear in stage.adapted_linears() for each in linear.lora_parameters()),
            layout,
        )
        optimizer = torch.optim.AdamW([adapter.values], lr=case["lr"])
        batches = [_micro_batch(each, layout.device) for each in case["micro_batches"]]
        supervised = sum(len(batch.micro.supervised) for batch in batches)

        def step() -> float:
            adapter.zero_gradients()
            loss = stage.train(batches) / supervised
            adapter.reduce_gradients()
            adapter.gradients.div_(supervised)
            optimizer.step()
            return float(loss)

        result = measure_steps(step, num_steps=arguments.steps)
        side = "ours" if arguments.sequence_parallel else "ours-whole"
        write_result(arguments.case, side, layout.world.rank, result)
        if arguments.floors:
            floors = floor_steps(model.config, case, layout.tensor)
            sides = {"beside floors": step} | floors
            for name, each in measure_in_turns(sides, num_steps=arguments.steps).items():
                write_result(arguments.case, f"{side} {name}", layout.world.rank, each)


def _micro_batch(values: dict[str, Any], device: torch.device) -> WeightedBatch:
    labels = torch.tensor(values["labels"], device=device)
    supervised = (labels >= 0).nonzero().squeeze(1)
    micro = MicroBatch(
        tokens=torch.tensor(values["tokens"], device=device),
        labels=labels[supervised],
        supervised=supervised,
        cu_seqlens=tuple(values["cu_seqlens"]),
        row_tokens=(len(labels),),
    )
    return WeightedBatch(micro)


if __name__ == "__main__":
    main()
