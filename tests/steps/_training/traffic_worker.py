"""Ranks of test_traffic.py: what goes over the wire, by kind and bytes, beside torch's own count.

``traffic_worker.py REPORT``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel import collectives
from nemotron.steps._tensor_parallel.host_exchange import HostExchange
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.batches import MicroBatch
from nemotron.steps._training.distributed import Layout, make_layout
from nemotron.steps._training.flat_adapter import FlatAdapter
from nemotron.steps._training.pipeline import PipelineStage, WeightedBatch

NUM_LAYERS, HIDDEN, TOKENS, NUM_MICRO_BATCHES = 5, 32, 24, 3
LORA_DIM, ODD_LORA_DIM = 8, 12  # the second is no multiple of 8
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
Traffic = dict[str, dict[str, float]]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    on_host = make_layout(size, size, torch.device("cpu"))
    assert on_host.tensor.host is not None
    layout = replace(on_host, tensor=replace(on_host.tensor, host=None))  # as between hosts
    report = {}
    for sequence_parallel in (False, True):
        name = "sequence" if sequence_parallel else "tensor"
        for kind, dim in (("base", None), ("lora", LORA_DIM), ("odd lora", ODD_LORA_DIM)):
            report[f"{name} {kind}"] = layer_traffic(layout, sequence_parallel, dim=dim)
        report[f"{name} step"] = step_traffic(layout, sequence_parallel)
        report[f"{name} step on one host"] = step_traffic(on_host, sequence_parallel)
    if layout.is_first:
        Path(sys.argv[-1]).write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def model(
    layout: Layout, sequence_parallel: bool, *, dim: int | None, layers: range | None = None
) -> GPTModel:
    torch.manual_seed(0)
    made = GPTModel(
        DecoderConfig.from_hf(CONFIG),
        lora=LoraTargets(TARGETS, LoraSpec(dim, 8.0)) if dim else None,
        group=layout.tensor,
        dtype=torch.float32,
        sequence_parallel=sequence_parallel,
        layers=layers,
    )
    for buffer in made.buffers():
        torch.nn.init.normal_(buffer, std=0.1)
    for linear in made.adapted_linears():
        linear.init_lora(seed=1)
    return made


def layer_traffic(layout: Layout, sequence_parallel: bool, *, dim: int | None) -> Traffic:
    """Return the traffic of three layers in the middle of a model, forward and backward."""
    middle = model(layout, sequence_parallel, dim=dim, layers=range(1, 4))
    rows = middle.rows_per_rank(TOKENS)
    received = torch.randn(rows, HIDDEN, requires_grad=True)
    out: list[Tensor] = []
    tokens = torch.zeros(TOKENS, dtype=torch.int64)
    with watched() as forward:
        out.append(middle(tokens, (0, 10, TOKENS), received_SH=received))
    with watched() as backward:
        out[0].sum().backward()
    return {"forward": dict(forward), "backward": dict(backward)}


def step_traffic(layout: Layout, sequence_parallel: bool) -> Traffic:
    """Return the traffic of a whole model's micro batches, and of what ends the step."""
    whole = model(layout, sequence_parallel, dim=LORA_DIM)
    stage = PipelineStage([whole], group=layout.pipeline, device=layout.device)
    adapter = FlatAdapter(
        (each for linear in stage.adapted_linears() for each in linear.lora_parameters()),
        layout,
    )
    tokens = torch.arange(TOKENS)
    micro = MicroBatch(tokens, tokens[:7], tokens[:7], (0, 10, TOKENS), (TOKENS,))
    with watched(layout.tensor.host) as batches:
        stage.train([WeightedBatch(micro)] * NUM_MICRO_BATCHES)
    with watched() as end:
        adapter.reduce_gradients()
    return {"micro batches": dict(batches), "end": dict(end)}


@contextmanager
def watched(host: HostExchange | None = None) -> Iterator[Counter[str]]:
    """Count calls by kind, their bytes on a ring, and every collective that torch itself saw.

    Those that a host's ranks do in shared memory are of the kind ``start``.
    """
    seen: Counter[str] = Counter()
    size = dist.get_world_size()
    names = ("all_reduce", "_all_gather_single", "_reduce_scatter", "start")
    places = (collectives.dist, collectives, collectives, host or SimpleNamespace(start=None))
    # Of the tensor given first a ring sends this share per rank: see the reference of each.
    shares = (2 * (size - 1) / size, (size - 1) / size, (size - 1), 1)
    originals = [getattr(place, name) for place, name in zip(places, names, strict=True)]

    def counting(name: str, original: Callable[..., Any], share: float) -> Callable[..., Any]:
        def call(first: Tensor, *arguments: Any, **options: Any) -> Any:
            seen[name.strip("_").removesuffix("_single")] += 1
            seen["bytes"] += round(share * first.nbytes)
            return original(first, *arguments, **options)

        return call

    for place, name, original, share in zip(places, names, originals, shares, strict=True):
        setattr(place, name, counting(name, original, share))
    try:
        # Not torch.profiler, which imports torch's compiler first.
        profile = torch.autograd.profiler.profile(use_kineto=True)
        with profile:
            yield seen
    finally:
        for place, name, original in zip(places, names, originals, strict=True):
            setattr(place, name, original)
    assert profile.kineto_results is not None
    events = profile.kineto_results.events()
    seen["all"] = sum(event.name().startswith("c10d::") for event in events)


if __name__ == "__main__":
    main()
