"""Thirty clipped steps on packed rows at every layout of up to four ranks, against one rank.

Losses, gradient norms, adapters and the first gradients are those of one rank, whose first
gradients are those of PEFT on an unsharded transformers model that never saw a pack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import join_rows, lora_hf_modules, weight_rules
from nemotron.steps._training.batches import PackedSplit
from tests.steps._training.layout_worker import (
    GLOBAL_BATCH,
    LORA,
    TARGETS,
    VOCABULARY,
    Case,
    cases,
)

WORKER = Path(__file__).with_name("layout_worker.py")
NUM_ROWS = 12
ALL = [case for num_ranks in (1, 2, 4) for case in cases(num_ranks)]
# Relative, of each step's loss and norm. A sum over ranks in another order moves a loss by an ulp
# or two: 2.2e-16 in float64, 1.2e-7 in float32, and thirty steps of AdamW carry that on.
LOSS = {"float64": 1e-12, "float32": 2e-6}
# Relative L2 of all factors together. AdamW divides by the gradient's size and so amplifies
# rounding: another number of threads alone moves an adapter by 1e-5 in float32.
ADAPTER = {"float64": 1e-10, "float32": 5e-5}
# Relative L2 of each factor's gradient in the first step.
GRADIENT = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    ).save_pretrained(root / "hf")
    write_rows(root / "train")
    (root / "adapter").mkdir()
    factors = {
        module: (0.2 * torch.randn(LORA.dim, shape[1]), 0.2 * torch.randn(shape[0], LORA.dim))
        for module, shape in linears(decoder(root)).items()
    }
    write_adapter(
        root / "adapter",
        factors,
        config=decoder(root),
        dim=LORA.dim,
        alpha=LORA.alpha,
        dropout=0.0,
        base_model_name_or_path="random",
    )
    return root


def decoder(root: Path) -> DecoderConfig:
    values = json.loads((root / "hf" / "config.json").read_text(encoding="utf-8"))
    return DecoderConfig.from_hf(values)


def linears(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every linear of every layer by its Megatron name."""
    found = {}
    for rule in weight_rules(config):
        name = rule.megatron.removesuffix(".weight")
        for layer in range(config.num_layers if name.endswith(TARGETS) else 0):
            found[name.replace("layers", f"layers.{layer}")] = rule.shape
    return found


def write_rows(directory: Path) -> None:
    """Write rows of two or three documents, of odd lengths, with some tokens supervised."""
    generator = np.random.default_rng(0)
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for _ in range(NUM_ROWS):
        lengths = generator.integers(3, 10, generator.integers(2, 4))
        starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        mask = generator.integers(0, 2, lengths.sum())
        mask[np.cumsum(lengths) - 1] = 0
        mask[0] = 1
        rows.append(
            (generator.integers(0, VOCABULARY, lengths.sum()).tolist(), mask.tolist(), starts)
        )
    types, by_column = (pa.int32(), pa.uint8(), pa.int32()), zip(*rows, strict=True)
    columns = [pa.array(c, pa.list_(t)) for c, t in zip(by_column, types, strict=True)]
    directory.mkdir()
    table = pa.table(columns, names=["input_ids", "loss_mask", "seq_start_id"])
    pq.write_table(table, directory / "shard-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def trained(world: Path, run_ranks: Callable[..., Any]) -> dict[str, Path]:
    """Return the figures of every case by its name."""
    files: dict[str, str] = {}
    for num_ranks in (1, 2, 4):
        files |= run_ranks(WORKER, num_ranks, str(world))
    return {name: Path(path) for name, path in files.items()}


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the relative L2 distance of all tensors together."""
    square = sum(float((got[name].double() - wanted[name]).square().sum()) for name in wanted)
    return (square / sum(float(each.double().square().sum()) for each in wanted.values())) ** 0.5


def part(figures: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind} "
    return {key.removeprefix(prefix): each for key, each in figures.items() if prefix in key}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_losses_norms_and_gradients_are_the_same_at_every_layout(
    trained: dict[str, Path], case: Case
) -> None:
    got = load_file(trained[case.name])
    alone = replace(case, tensor=1, sequence_parallel=False, pipeline=1, data=1)
    if case.per_token_loss:
        alone = replace(alone, micro_batch_size=1)
    wanted = load_file(trained[alone.name])
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(got[key], wanted[key], rtol=LOSS[case.dtype], atol=0.0)
    assert got["spread"].max() == 0.0, "copies of a replicated factor differ"
    assert distance(part(got, "adapter"), part(wanted, "adapter")) <= ADAPTER[case.dtype]
    gradients = part(got, "gradient")
    for name, gradient in part(wanted, "gradient").items():
        assert distance({name: gradients[name]}, {name: gradient}) <= GRADIENT[case.dtype], name


def test_the_run_is_one_that_could_differ(trained: dict[str, Path]) -> None:
    for case in (Case("float64"), Case("float64", dropout=0.3)):
        figures = load_file(trained[case.name])
        assert figures["grad_norm"].min() > 0.2, "clipping is active in every step"
        epochs = figures["loss"].view(-1, NUM_ROWS // GLOBAL_BATCH).mean(dim=1)
        assert epochs[-1] < epochs[0]
        assert all(float(each.abs().max()) > 0.0 for each in part(figures, "gradient").values())
    dropped = load_file(trained[Case("float64", dropout=0.3).name])
    assert not torch.equal(dropped["loss"], load_file(trained[Case("float64").name])["loss"])


@pytest.mark.parametrize(
    "case",
    [
        Case("float64"),
        Case("float32"),
        Case("float64", micro_batch_size=2, per_token_loss=False),
    ],
    ids=lambda case: case.name,
)
def test_first_gradients_are_those_of_peft_on_unpacked_documents(
    trained: dict[str, Path], world: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers norms in float32, whatever the type of the model.
    monkeypatch.setattr(LlamaRMSNorm, "forward", rms_norm)
    dtype = case.dtype
    base = LlamaForCausalLM.from_pretrained(world / "hf", dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, str(world / "adapter"), is_trainable=True)
    model = model.to(getattr(torch, dtype))
    rows = PackedSplit(world / "train", vocab_size=VOCABULARY)
    batch = rows.global_batch(0, global_batch_size=GLOBAL_BATCH, seed=1)
    losses, supervised = [], []  # of each row
    for row in (rows[number] for number in batch):
        losses.append(torch.zeros((), dtype=torch.float64))
        supervised.append(0)
        for start, stop in pairwise([*row.seq_start_id.tolist(), len(row.input_ids)]):
            ids = torch.from_numpy(row.input_ids[start:stop].astype(np.int64))
            mask = torch.from_numpy(row.loss_mask[start : stop - 1].astype(bool))
            logits = model(ids[None, :-1]).logits[0]
            summed = F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
            losses[-1] = losses[-1] + summed.double()
            supervised[-1] += int(mask.sum())
    means_of = GLOBAL_BATCH if case.per_token_loss else case.micro_batch_size
    sums, counts = torch.stack(losses), torch.tensor(supervised)
    (sums.view(-1, means_of).sum(dim=1) / counts.view(-1, means_of).sum(dim=1)).mean().backward()
    figures = load_file(trained[case.name])
    wanted_loss = sums.detach().sum() / counts.sum()  # logged over all tokens in both
    torch.testing.assert_close(figures["loss"][0], wanted_loss, rtol=LOSS[dtype], atol=0.0)
    gradients = part(figures, "gradient")
    for name, wanted in peft_gradients(model, decoder(world)).items():
        assert distance({name: gradients[name]}, {name: wanted}) <= GRADIENT[dtype], name


def rms_norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def peft_gradients(model: PeftModel, config: DecoderConfig) -> dict[str, Tensor]:
    """Return PEFT's gradients as those of the fused linears: lora_a is one that all parts share."""
    parameters = dict(model.named_parameters())
    gradients = {}
    for module in linears(config):
        parts = []
        for factor in ("A", "B"):
            names = (
                f"base_model.model.{hf}.lora_{factor}.default.weight"
                for hf in lora_hf_modules(module)
            )
            parts.append([parameters[name].grad for name in names])
        target = module.rpartition(".")[2]
        rule = next(r for r in weight_rules(config) if r.megatron.endswith(f"{target}.weight"))
        gradients[f"{module}.lora_a"] = torch.stack(parts[0]).sum(dim=0)
        gradients[f"{module}.lora_b"] = join_rows(parts[1], layout=rule.layout, config=config)
    return gradients
