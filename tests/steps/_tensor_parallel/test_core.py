"""The core on 2 and 4 gloo ranks against one unsharded model (core_worker.py), in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_reduce_async
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
    draw_lora_a,
)
from nemotron.steps._tensor_parallel.prologue import (
    Prologue,
    RMSNormPrologue,
    SwiGLUPrologue,
)
from nemotron.steps._tensor_parallel.vocabulary import vocabulary_rows

WORKER = Path(__file__).with_name("core_worker.py")
# Sums of at most 33 float64 products in another order: a few units in the last place (2.2e-16).
ROUNDING = 1e-14


@pytest.fixture(scope="module", params=[2, 4])
def report(request: pytest.FixtureRequest, run_ranks: Callable[..., Any]) -> dict[str, float]:
    return run_ranks(WORKER, request.param)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("linear", ["column", "row"])
def test_output_and_every_gradient_equal_the_unsharded_linear(
    report: dict[str, float], linear: str, sequence_parallel: bool, dropout: float
) -> None:
    prefix = f"{linear} sp={sequence_parallel} dropout={dropout}"
    figures = {name: value for name, value in report.items() if name.startswith(prefix)}
    assert len(figures) >= 6
    assert max(figures.values()) <= ROUNDING, figures


def test_replicated_lora_b_gradient_is_the_same_bits_on_every_rank(
    report: dict[str, float],
) -> None:
    assert report["row sp=False dropout=0.0 between ranks"] == 0.0
    assert report["row sp=False dropout=0.5 between ranks"] == 0.0


@pytest.mark.parametrize("figure", ["embedding", "cross entropy loss", "cross entropy dx"])
def test_vocabulary_that_no_rank_count_divides_equals_the_unsharded_one(
    report: dict[str, float], figure: str
) -> None:
    assert report[figure] <= ROUNDING


@pytest.mark.parametrize("factor", ["column A", "column B", "row A", "row B"])
def test_the_same_seed_gives_the_same_adapter_bits_at_every_tensor_parallel_size(
    report: dict[str, float], factor: str
) -> None:
    assert report[f"init {factor}"] == 0.0


def test_each_linear_issues_one_collective_in_one_direction(report: dict[str, float]) -> None:
    assert report["forward column sp=False dx=True"] == 0
    assert report["backward column sp=False dx=True"] == 1
    assert report["forward row sp=False dx=True"] == 1
    assert report["backward row sp=False dx=True"] == 0


@pytest.mark.parametrize("linear", ["column", "row"])
def test_under_sequence_parallelism_each_linear_issues_one_collective_each_way(
    report: dict[str, float], linear: str
) -> None:
    assert report[f"forward {linear} sp=True dx=True"] == 1
    assert report[f"backward {linear} sp=True dx=True"] == 1


def test_the_first_layer_computes_no_input_gradient_and_sends_none(
    report: dict[str, float],
) -> None:
    assert report["backward column sp=False dx=False"] == 0


def test_lora_a_is_drawn_over_the_whole_fan_in() -> None:
    drawn = draw_lora_a(seed=1, name="x", lora_dim=64, in_features=4096)
    # 262,144 samples: the standard error of a standard deviation is 0.14 %.
    assert drawn.std().item() == pytest.approx((2.0 / (4096 + 64)) ** 0.5, rel=0.01)


def test_draws_of_different_names_differ() -> None:
    assert not torch.equal(draw_lora_a(1, "a", 2, 8), draw_lora_a(1, "b", 2, 8))


def make_column(size: int) -> ColumnParallelLinear:
    group = ProcessGroup(None, 0, size)
    return ColumnParallelLinear(
        "decoder.layers.0.mlp.linear_fc1",
        8,
        12,
        lora=LoraSpec(2, 4.0),
        group=group,
        dtype=torch.float32,
    )


def make_row(size: int) -> RowParallelLinear:
    group = ProcessGroup(None, 0, size)
    return RowParallelLinear(
        "decoder.layers.0.mlp.linear_fc2",
        12,
        8,
        lora=LoraSpec(2, 4.0),
        group=group,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("make", [make_column, make_row])
def test_indivisible_features_are_refused_by_name_dimension_and_size(
    make: Callable[[int], Any],
) -> None:
    message = r"decoder\.layers\.0\.mlp\.linear_fc[12]: .* 12 is not divisible by .*size 5"
    with pytest.raises(ValueError, match=message):
        make(5)


def test_a_pre_sliced_factor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lora_b: got shape \(6, 2\), wanted \(12, 2\)"):
        make_column(2).load_lora(torch.zeros(2, 8), torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"lora_a: got shape \(2, 6\), wanted \(2, 12\)"):
        make_row(2).load_lora(torch.zeros(2, 6), torch.zeros(8, 2))


def test_a_base_shard_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight: got shape \(12, 8\), wanted \(6, 8\)"):
        make_column(2).load_weight(torch.zeros(12, 8))


def test_a_vocabulary_that_leaves_a_rank_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 5 leaves a rank without rows"):
        vocabulary_rows(5, ProcessGroup(None, 0, 4))


def test_a_non_contiguous_tensor_is_refused_before_gloo_corrupts_it() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        all_reduce_async(torch.zeros(4, 4).T, ProcessGroup(None, 0, 2))


def test_bf16_base_keeps_fp32_masters_and_gradients() -> None:
    linear = ColumnParallelLinear(
        "column", 8, 4, lora=LoraSpec(2, 4.0), group=ProcessGroup(), dtype=torch.bfloat16
    )
    linear.load_weight(torch.randn(4, 8))
    linear.init_lora(seed=1)
    y, _ = linear(torch.randn(3, 8, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert (y.dtype, linear.lora_a.dtype) == (torch.bfloat16, torch.float32)
    assert linear.lora_b.grad is not None
    assert linear.lora_b.grad.dtype == torch.float32


def test_a_linear_without_an_adapter_saves_no_activation() -> None:
    linear = RowParallelLinear("row", 12, 8, lora=None, group=ProcessGroup(), dtype=torch.float32)
    linear.load_weight(torch.randn(8, 12))
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(torch.randn(64, 12, requires_grad=True))
    assert sum(saved) == 0


def test_a_residual_is_added_and_gets_the_gradient_of_the_output() -> None:
    spec = LoraSpec(dim=2, alpha=4.0)
    linear = RowParallelLinear("row", 12, 8, lora=spec, group=ProcessGroup(), dtype=torch.float64)
    linear.load_weight(torch.randn(8, 12))
    linear.init_lora(seed=1)
    x, dy = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    residual = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    added = linear(x, residual_SF=residual)
    torch.testing.assert_close(added, linear(x) + residual, rtol=0.0, atol=0.0)
    added.backward(dy)
    assert residual.grad is not None
    assert torch.equal(residual.grad, dy)


NORM_WEIGHT = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("prologue", "plainly"),
    [
        (
            RMSNormPrologue(NORM_WEIGHT, 1e-5),
            lambda x: NORM_WEIGHT * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5),
        ),
        (SwiGLUPrologue(), lambda x: x[:, :3] * torch.sigmoid(x[:, :3]) * x[:, 3:]),
    ],
)
def test_a_prologue_and_its_gradient_are_those_of_the_formula(
    prologue: Prologue, plainly: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = torch.empty_like(plainly(x))
    statistic = prologue.apply(x, out=output)
    dy, dh = torch.randn_like(output), torch.randn(5, 2, dtype=torch.float64)
    lora_a_gradient, recomputed = prologue.lora_a_gradient(dh, x, statistic, None)
    wanted, (gradient,) = torch.autograd.functional.vjp(plainly, (x,), dy)
    assert isinstance(wanted, torch.Tensor)
    # The same few float64 operations in another order.
    torch.testing.assert_close(output, wanted, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(lora_a_gradient, dh.T @ wanted, rtol=1e-13, atol=1e-14)
    for each in (None if recomputed is None else recomputed.clone(), None):
        got = prologue.gradient(dy.clone(), x, statistic, each)
        torch.testing.assert_close(got, gradient, rtol=1e-13, atol=1e-14)
    added = torch.randn_like(x)
    got = prologue.gradient(dy.clone(), x, statistic, recomputed, added)
    torch.testing.assert_close(got, gradient + added, rtol=1e-13, atol=1e-14)
