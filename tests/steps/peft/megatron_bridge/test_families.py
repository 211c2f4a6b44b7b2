"""Every model family through the whole path: trained over ranks and stages, merged, compared."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._formats.megatron import open_megatron
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.base_model import load_base_model
from nemotron.steps.convert.merge_lora.schema import Config
from nemotron.steps.convert.merge_lora.step import run as merge
from tests.peers.families import MODELS, VOCABULARY, make_model
from tests.steps.peft.megatron_bridge.conftest import (
    PRODUCER,
    World,
    convert,
    write_config,
    write_packs,
)

WORKER = Path(__file__).with_name("families_worker.py")
CU_SEQLENS = (0, 20, 21, 50)
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


LAYOUT = {
    "recipe.tensor_model_parallel_size": 2,
    "recipe.pipeline_model_parallel_size": 2,
    "train.train_iters": 2,
    "train.eval_interval": 2,
    "optimizer.lr": 0.02,
    "scheduler.lr_warmup_iters": 0,
}


@pytest.fixture(scope="module")
def runs(run_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with, for every family, a base and what two steps made of it."""
    root = tmp_path_factory.mktemp("families")
    write_packs(root / "packs")
    configs = []
    for family in MODELS:
        directory = root / family
        # Four layers as wide as these keep the logits near 1, and so their rounding near 1e-7.
        model = make_model(family, num_hidden_layers=4, initializer_range=0.1)
        model.save_pretrained(directory / "hf")
        convert(directory / "hf", directory / "base")
        world = World(directory / "hf", directory / "base", root / "packs")
        configs.append(str(write_config(world, directory, LAYOUT)))
    run_ranks(WORKER, 4, *configs, ",".join(free_ports(len(configs))))
    return root


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("localhost", 0))
        return [str(each.getsockname()[1]) for each in bound]


@pytest.mark.parametrize("family", MODELS)
def test_two_steps_over_ranks_and_stages_merge_into_what_transformers_computes(
    tmp_path: Path, runs: Path, family: str
) -> None:
    base, adapter = runs / family / "base", runs / family / "out" / "iter_0000002"
    paths = {
        "lora_checkpoint": adapter,
        "base_megatron_path": base,
        "output_hf_path": tmp_path / "merged",
    }
    merge(Config.model_validate(paths), PRODUCER)

    tokens = torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1))
    got = trainers_logits(base, adapter, tokens)
    before = trainers_logits(base, None, tokens)
    assert (got - before).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for begin, end in pairwise(CU_SEQLENS):
        with torch.no_grad():
            wanted = merged(tokens[begin:end].unsqueeze(0)).logits[0]
        # fp32; base and adapter apart round each product once more than the merged weight does.
        torch.testing.assert_close(got[begin:end], wanted, rtol=0, atol=1e-5)


def trainers_logits(base: Path, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    model = load_base_model(
        open_megatron(base),
        lora=adapter and LoraTargets(TARGETS, LoraSpec(dim=4, alpha=8.0)),
        group=ProcessGroup(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    if adapter is not None:
        factors = open_adapter(adapter, config=model.config).factors()
        for linear in model.adapted_linears():
            linear.load_lora(*factors[linear.name])
    with torch.no_grad():
        return model.logits(model(tokens, CU_SEQLENS))
