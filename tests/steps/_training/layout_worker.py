"""Ranks of test_layout_invariance.py: the same training at every layout that these ranks can be.

``layout_worker.py WORLD REPORT``: every layout of as many ranks as were started is trained for
``NUM_STEPS`` steps; rank 0 leaves a safetensors file of each beside the report, which names them.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from nemotron.steps._formats.as_megatron import AsMegatron
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps._training.batches import PackedSplit
from nemotron.steps._training.distributed import Layout, make_layout
from nemotron.steps._training.loop import AdamSettings, BatchSettings, Trainer
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.pipeline_schedule import split_layers
from nemotron.steps._training.schedule import Schedule
from nemotron.steps._training.trainer_state import gather_whole, load_adapter

NUM_STEPS, GLOBAL_BATCH, CLIP_GRAD, VOCABULARY = 30, 4, 0.2, 64
LORA = LoraSpec(dim=4, alpha=8.0)
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Case:
    """One way to train: how it is split, how exactly, with how much dropout, over what mean."""

    dtype: str
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    data: int = 1
    micro_batch_size: int = 1
    dropout: float = 0.0
    per_token_loss: bool = True

    @property
    def name(self) -> str:
        """What the file of its figures is called."""
        return "-".join(str(value) for value in astuple(self))


def cases(num_ranks: int) -> list[Case]:
    """Return every case of a number of ranks."""
    found = []
    for dtype, tensor, sequence_parallel, pipeline, data, micro, dropout in itertools.product(
        ("float64", "float32"), (1, 2, 4), (False, True), (1, 2), (1, 2), (1, 2), (0.0, 0.3)
    ):
        case = Case(dtype, tensor, sequence_parallel, pipeline, data, micro, dropout)
        is_new = tensor > 1 or not sequence_parallel
        # What a micro batch of two changes, or dropout, float64 shows best.
        is_plain = micro == 1 and dropout == 0.0
        has_dropout_case = micro == 1 and _shows_dropout(case)
        is_shown = dtype == "float64" and (dropout == 0.0 or has_dropout_case)
        if tensor * pipeline * data == num_ranks and is_new and (is_plain or is_shown):
            found.append(case)
    if num_ranks < 4:  # only how rows are dealt to replicas could matter
        found.append(Case("float64", data=num_ranks, micro_batch_size=2, per_token_loss=False))
    return found


def _shows_dropout(case: Case) -> bool:
    """Return whether a case is among those with dropout: masks are the same bits or they are not.

    Of four ranks, which take their time on two cores, three cases that have every way to split.
    """
    splits = case.tensor, case.sequence_parallel, case.pipeline, case.data
    four = ((4, True, 1, 1), (2, False, 2, 1), (2, True, 1, 2))
    return case.tensor * case.pipeline * case.data < 4 or splits in four


def main() -> None:
    torch.set_num_threads(1)
    world_dir, report = Path(sys.argv[1]), Path(sys.argv[2])
    files = {}
    dist.init_process_group("gloo")
    for case in cases(dist.get_world_size()):
        layout = make_layout(case.tensor, case.tensor * case.data, torch.device("cpu"))
        figures = train(world_dir, case, layout)
        files[case.name] = str(report.with_name(f"{case.name}.safetensors"))
        if layout.is_first:
            save_file(figures, files[case.name])
    if dist.get_rank() == 0:
        report.write_text(json.dumps(files), encoding="utf-8")
    dist.destroy_process_group()


class Record:
    """Takes the place of the metrics log: what each step said."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def is_shown(self, iteration: int) -> bool:
        return False


def train(world_dir: Path, case: Case, layout: Layout) -> dict[str, Tensor]:
    """Return losses, gradient norms, replicas' differences, first gradients and the adapter."""
    record = Record()
    model = load_stage(world_dir, case, layout)
    trainer = Trainer(
        model,
        layout=layout,
        train_rows=PackedSplit(world_dir / "train", vocab_size=VOCABULARY),
        valid_rows=None,
        batch=BatchSettings(GLOBAL_BATCH, case.micro_batch_size, case.per_token_loss),
        # As Megatron's the first step's rate is 0, so step 2 still starts from the same adapter.
        # AdamW carries rounding on with its rate: at twice this one, gradient norms in float32 come
        # apart by 2.2e-6 on one kind of CPU and by less than 2e-6 on another.
        schedule=Schedule(5e-4, 5e-5, 3, NUM_STEPS, "cosine"),
        adam=AdamSettings(0.9, 0.95, 1e-8, 0.1, CLIP_GRAD),
        seed=1,
        metrics=cast(MetricsLog, record),
    )
    spreads, first = [], {}
    for iteration in range(1, NUM_STEPS + 1):
        trainer.step(iteration)
        spreads.append(trainer.adapter.replica_difference())
        if iteration == 1:
            clipped = min(1.0, CLIP_GRAD / (record.steps[0]["grad_norm"] + 1e-6))
            first = gathered(model, layout, trainer.adapter.gradients / clipped, trainer)
    figures = {
        "loss": [step["lm_loss"] for step in record.steps],
        "grad_norm": [step["grad_norm"] for step in record.steps],
        "spread": spreads,
    }
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in figures.items()}
    tensors |= {f"gradient {name}": tensor for name, tensor in first.items()}
    adapter = gathered(model, layout, trainer.adapter.values.detach(), trainer)
    return tensors | {f"adapter {name}": tensor for name, tensor in adapter.items()}


def load_stage(world_dir: Path, case: Case, layout: Layout) -> PipelineStage:
    base = AsMegatron(HuggingFaceCheckpoint(world_dir / "hf"))
    lora = LoraTargets(TARGETS, LoraSpec(LORA.dim, LORA.alpha, case.dropout))
    layers = split_layers(base.config.num_layers, case.pipeline, first=None, last=None)
    chunk = load_base_model(
        base,
        lora=lora,
        group=layout.tensor,
        dtype=getattr(torch, case.dtype),
        device=layout.device,
        sequence_parallel=case.sequence_parallel,
        layers=layers[layout.pipeline.rank],
    )
    model = PipelineStage([chunk], group=layout.pipeline, device=layout.device)
    load_adapter(world_dir / "adapter", model)
    return model


def gathered(
    model: PipelineStage, layout: Layout, flat: Tensor, trainer: Trainer
) -> dict[str, Tensor]:
    """Return what is laid out as the flat adapter, as whole matrices of all stages, by name."""
    return gather_whole(model, trainer.adapter.views(flat), layout)


if __name__ == "__main__":
    main()
