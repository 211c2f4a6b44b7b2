"""Collectives of whole layers and steps, counted and weighed on two ranks (traffic_worker.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.steps._training.traffic_worker import (
    HIDDEN,
    LORA_DIM,
    NUM_LAYERS,
    NUM_MICRO_BATCHES,
    ODD_LORA_DIM,
)

WORKER = Path(__file__).with_name("traffic_worker.py")
COUNTED_LAYERS = 3


@pytest.fixture(scope="module")
def traffic(run_ranks: Callable[..., Any]) -> dict[str, dict[str, dict[str, float]]]:
    return run_ranks(WORKER, 2)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_layer_issues_two_all_reduces_each_way(traffic: Any, direction: str) -> None:
    for kind in ("tensor lora", "tensor odd lora", "tensor base"):
        counted = traffic[kind][direction]
        assert counted["all_reduce"] == counted["all"] == 2 * COUNTED_LAYERS, kind


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_under_sequence_parallelism_a_layer_issues_two_pairs_and_gathers_nothing_again(
    traffic: Any, direction: str
) -> None:
    for kind in ("sequence lora", "sequence odd lora", "sequence base"):
        counted = traffic[kind][direction]
        pairs = 2 * COUNTED_LAYERS
        assert counted["all_gather"] == counted["reduce_scatter"] == pairs, kind
        assert counted["all"] == 2 * pairs, kind


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
@pytest.mark.parametrize(("kind", "rank"), [("lora", LORA_DIM), ("odd lora", ODD_LORA_DIM + 4)])
def test_an_adapter_adds_its_rank_to_the_bytes_of_the_base_and_no_more(
    traffic: Any, mode: str, kind: str, rank: int
) -> None:
    """A rank is sent as the next multiple of 8, so that the rows of what is sent are aligned."""
    totals = dict.fromkeys((kind, "base"), 0.0)
    for direction in ("forward", "backward"):
        lora, base = (traffic[f"{mode} {each}"][direction]["bytes"] for each in totals)
        assert base < lora <= (1 + rank / HIDDEN) * base or lora == base
        totals[kind], totals["base"] = totals[kind] + lora, totals["base"] + base
    assert totals["base"] < totals[kind] <= (1 + rank / HIDDEN) * totals["base"]


@pytest.mark.parametrize(
    ("mode", "of_layers", "of_ends"),
    [
        # Four a layer, one less in the first, whose input has no gradient; embedding, softmax's
        # sums, and the gradient of the output layer.
        ("tensor", 4 * NUM_LAYERS - 1, 3),
        # Twice as many halves; the first layer still sends dh, the R columns that lora_a needs.
        # The ends have the final gather of the sequence as well.
        ("sequence", 8 * NUM_LAYERS, 4),
    ],
)
def test_a_micro_batch_has_the_layers_collectives_and_few_at_its_ends(
    traffic: Any, mode: str, of_layers: int, of_ends: int
) -> None:
    counted = traffic[f"{mode} step"]["micro batches"]
    assert counted["all"] == NUM_MICRO_BATCHES * (of_layers + of_ends)
    on_one_host = traffic[f"{mode} step on one host"]["micro batches"]
    assert on_one_host["start"] == counted["all"]
    assert on_one_host["all"] == 0


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
def test_a_step_ends_with_one_flat_all_reduce(traffic: Any, mode: str) -> None:
    counted = traffic[f"{mode} step"]["end"]
    assert counted["all"] == counted["all_reduce"] == 1
