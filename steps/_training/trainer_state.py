"""What a save holds beside the adapter, so that training goes on as if it had never stopped.

The adapter file is the fp32 masters. ``trainer_state.safetensors`` holds AdamW's two moments, each
whole and by name of its factor, hence readable at every layout. ``trainer_state.json`` holds the
position in the run and what the run's result depends on. There is no state of random generators:
initial values, row order and dropout are functions of the seed, the iteration and the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.safetensors_file import SafetensorsFile, write_safetensors
from nemotron.steps._tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from nemotron.steps._training.adamw import FlatAdamW
from nemotron.steps._training.distributed import Layout, gather_tensors
from nemotron.steps._training.flat_adapter import FlatAdapter
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.resume import STATE_FILE

MOMENTS_FILE = "trainer_state.safetensors"


def gather_moments(
    model: PipelineStage, adapter: FlatAdapter, optimizer: FlatAdamW, layout: Layout
) -> dict[str, Tensor]:
    """Return AdamW's moments, such as ``exp_avg/decoder...linear_qkv.lora_a``; see gather_whole."""
    moments: dict[str, Tensor] = {}
    for kind, moment in optimizer.moments.items():
        whole = gather_whole(model, adapter.views(moment), layout)
        moments |= {f"{kind}/{name}": each for name, each in whole.items()}
    return moments


def gather_whole(
    model: PipelineStage, shards: Mapping[str, Tensor], layout: Layout
) -> dict[str, Tensor]:
    """Return whole tensors of all stages, on the CPU of the first rank; elsewhere nothing.

    A collective of the first rank's replica, in which one linear at a time is whole on the device.
    Ranks of other replicas take no part: theirs are the same.

    Args:
        model: This rank's layers.
        shards: What is shaped as this rank's factors, by the factors' names.
        layout: This rank's groups.
    """
    if layout.data.rank > 0:
        return {}
    whole: dict[str, Tensor] = {}
    for linear, names in _factors(model):
        factors = linear.gather_lora(*(shards[name] for name in names))
        if layout.tensor.rank == 0:
            whole |= {name: each.cpu() for name, each in zip(names, factors, strict=True)}
    if layout.tensor.rank > 0:
        return {}
    return gather_tensors(whole, layout.pipeline, layout.device)


def write_trainer_state(
    directory: Path, moments: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write both files of the state into a save that is being made."""
    write_safetensors(
        directory / MOMENTS_FILE,
        names=sorted(moments),
        shape=lambda name: tuple(moments[name].shape),
        dtype=lambda name: moments[name].dtype,
        blocks=lambda name: [moments[name].cpu()],
    )
    text = json.dumps(values, indent=2) + "\n"
    (directory / STATE_FILE).write_text(text, encoding="utf-8")


def load_adapter(directory: Path, model: PipelineStage) -> None:
    """Load this rank's shards of a saved adapter, with all checks of ``open_adapter``."""
    factors = open_adapter(directory, config=model.config).factors()
    for linear in model.adapted_linears():
        linear.load_lora(*factors[linear.name])


def load_moments(
    directory: Path,
    model: PipelineStage,
    adapter: FlatAdapter,
    optimizer: FlatAdamW,
    *,
    iteration: int,
) -> None:
    """Set AdamW to this rank's shards of the moments saved at ``iteration``.

    Raises:
        NemotronError: ``artifact_damaged``.
        ValueError: A tensor does not have its factor's shape.
    """
    file = SafetensorsFile(directory / MOMENTS_FILE)
    for kind, moment in optimizer.moments.items():
        shards = adapter.views(moment)
        for linear, names in _factors(model):
            whole = [file.read(f"{kind}/{name}") for name in names]
            for name, shard in zip(names, linear.shard_lora(*whole), strict=True):
                shards[name].copy_(shard)
    optimizer.num_steps = iteration


def _factors(
    model: PipelineStage,
) -> Iterator[tuple[ColumnParallelLinear | RowParallelLinear, tuple[str, str]]]:
    """Yield every adapted linear of this rank with the names of its two factors."""
    for linear in model.adapted_linears():
        first, second = (each.name for each in linear.lora_parameters())
        yield linear, (first, second)
