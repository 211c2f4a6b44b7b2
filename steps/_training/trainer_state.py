"""What a save holds beside the adapter, so that training continues as if it had never stopped.

The adapter file has the fp32 masters. ``trainer_state.safetensors`` has AdamW's two moments, whole
tensors under the names of their factors, so that every layout can read them.
``trainer_state.json`` has the position in the run and what the run's result depends on. There is no
state of random generators: initial values, row order and dropout are functions of the seed, the
iteration and the row.
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
    """Return AdamW's moments under names such as ``exp_avg/decoder...lora_a``; see gather_whole."""
    moments: dict[str, Tensor] = {}
    for kind, moment in optimizer.moments.items():
        whole = gather_whole(model, adapter.views(moment), layout)
        moments |= {f"{kind}/{name}": each for name, each in whole.items()}
    return moments


def gather_whole(
    model: PipelineStage, shards: Mapping[str, Tensor], layout: Layout
) -> dict[str, Tensor]:
    """Return whole tensors of all stages on the CPU of the first rank, and {} on other ranks.

    A collective of the first replica's ranks, in which one linear at a time is whole on the device.
    The ranks of other replicas take no part, since they have the same.

    Args:
        model: This rank's layers.
        shards: Tensors shaped as this rank's factors, by the factors' names.
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
