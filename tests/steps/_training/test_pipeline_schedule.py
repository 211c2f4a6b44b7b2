"""Who does what when: orders as published, no stall, and no more waiting than the bound."""

from __future__ import annotations

from itertools import product

import pytest

from nemotron.steps._training.pipeline_schedule import (
    Action,
    Tick,
    one_forward_one_backward,
    split_layers,
    timetable,
)

# Stages, chunks, micro batches: fewer than stages, multiples of them, and everything between.
SIZES = list(product((1, 2, 3, 4, 5, 6), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13)))


def spell(actions: list[Action]) -> str:
    """Return actions as F0 B0 ..., with the chunk as a letter where there are several."""
    has_chunks = any(each.chunk for each in actions)
    return " ".join(
        ("F" if each.is_forward else "B")
        + ("abc"[each.chunk] if has_chunks else "")
        + str(each.micro_batch)
        for each in actions
    )


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        (0, "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4"),
        (2, "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"),
        (3, "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"),
    ],
)
def test_a_stage_warms_up_with_a_forward_per_later_stage(stage: int, order: str) -> None:
    assert spell(one_forward_one_backward(stage, num_stages=4, num_micro_batches=5)) == order


def test_less_micro_batches_than_stages_are_all_warm_up() -> None:
    assert spell(one_forward_one_backward(0, num_stages=4, num_micro_batches=2)) == "F0 F1 B0 B1"


@pytest.mark.parametrize(
    ("stage", "order"),
    [
        (0, "Fa0 Fa1 Fb0 Fb1 Fa2 Bb0 Fa3 Bb1 Fb2 Ba0 Fb3 Ba1 Bb2 Bb3 Ba2 Ba3"),
        (1, "Fa0 Fa1 Fb0 Bb0 Fb1 Bb1 Fa2 Ba0 Fa3 Ba1 Fb2 Bb2 Fb3 Bb3 Ba2 Ba3"),
    ],
)
def test_chunks_take_turns_with_groups_of_micro_batches(stage: int, order: str) -> None:
    actions = one_forward_one_backward(stage, num_stages=2, num_micro_batches=4, num_chunks=2)
    assert spell(actions) == order


@pytest.mark.parametrize(("num_stages", "num_chunks", "num_micro_batches"), SIZES)
def test_every_schedule_ends_in_order_and_with_the_smallest_bubble(
    num_stages: int, num_chunks: int, num_micro_batches: int
) -> None:
    ticks = timetable(
        num_stages=num_stages, num_chunks=num_chunks, num_micro_batches=num_micro_batches
    )
    assert_dependencies_are_kept(ticks, num_stages, num_chunks)
    for stage in range(num_stages):
        mine = [tick[stage] for tick in ticks if tick[stage]]
        assert len(mine) == len(set(mine)) == 2 * num_chunks * num_micro_batches
        for chunk, is_forward in product(range(num_chunks), (True, False)):
            numbers = [
                each.micro_batch
                for each in mine
                if each and each.chunk == chunk and each.is_forward is is_forward
            ]
            # Gradients are added in the order of the micro batches, as without stages.
            assert numbers == list(range(num_micro_batches))
    if num_micro_batches >= num_stages:
        assert len(ticks) == 2 * num_chunks * num_micro_batches + 2 * (num_stages - 1)


def assert_dependencies_are_kept(ticks: tuple[Tick, ...], num_stages: int, num_chunks: int) -> None:
    done: set[tuple[bool, int, int]] = set()
    last = num_stages * num_chunks - 1
    for tick in ticks:
        now = {
            (each.is_forward, each.chunk * num_stages + stage, each.micro_batch)
            for stage, each in enumerate(tick)
            if each
        }
        for is_forward, virtual, micro_batch in now:
            if is_forward and virtual:
                assert (True, virtual - 1, micro_batch) in done
            if not is_forward:
                assert (True, virtual, micro_batch) in done
                assert virtual == last or (False, virtual + 1, micro_batch) in done
        done |= now


def test_one_chunk_holds_the_activations_of_no_more_micro_batches_than_stages_follow() -> None:
    for stage in range(4):
        held = most = 0
        for action in one_forward_one_backward(stage, num_stages=4, num_micro_batches=9):
            held += 1 if action.is_forward else -1
            most = max(most, held)
        assert most == 4 - stage


def test_an_evaluation_has_forwards_only() -> None:
    ticks = timetable(num_stages=3, num_micro_batches=4, has_backward=False)
    assert all(each.is_forward for tick in ticks for each in tick if each)
    assert len(ticks) == 4 + 2


def test_no_micro_batches_are_no_work() -> None:
    assert timetable(num_stages=2, num_micro_batches=0) == ()


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "first", "last", "sizes"),
    [
        (8, 4, None, None, [2, 2, 2, 2]),
        (10, 4, None, None, [3, 3, 2, 2]),
        (10, 4, 1, None, [1, 3, 3, 3]),
        (10, 4, None, 1, [3, 3, 3, 1]),
        (10, 4, 2, 3, [2, 3, 2, 3]),
        (5, 2, 2, 3, [2, 3]),
        (5, 1, None, None, [5]),
        (5, 1, 5, None, [5]),
    ],
)
def test_layers_are_spread_evenly_over_the_stages_that_are_free(
    num_layers: int, num_stages: int, first: int | None, last: int | None, sizes: list[int]
) -> None:
    parts = split_layers(num_layers, num_stages, first=first, last=last)
    assert [len(part) for part in parts] == sizes
    assert [layer for part in parts for layer in part] == list(range(num_layers))


@pytest.mark.parametrize(
    ("num_stages", "first", "last", "problem"),
    [
        (5, None, None, "4 layers cannot be split over 5 pipeline stages"),
        (3, 3, 1, "4 layers cannot be split over 3 pipeline stages, 3 in stage 0, 1 in stage 2"),
        (2, 1, 2, "4 layers cannot be split over 2 pipeline stages, 1 in stage 0, 2 in stage 1"),
        (2, 5, None, "4 layers cannot be split over 2 pipeline stages, 5 in stage 0"),
        (1, 3, None, "4 layers cannot be split over 1 pipeline stages, 3 in stage 0"),
        (1, 3, 4, "4 layers cannot be split over 1 pipeline stages, 3 in stage 0, 4 in stage 0"),
    ],
)
def test_a_split_that_leaves_a_stage_or_a_layer_alone_is_refused(
    num_stages: int, first: int | None, last: int | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"^{problem}$"):
        split_layers(4, num_stages, first=first, last=last)
