"""Pipeline parallelism: which layers each stage has, and in which order it works.

Plain Python over small integers, without torch: the ranks of a job and the checks before it use the
same functions, and the tests try all small sizes.

P stages (ranks of a pipeline), C chunks of layers per stage (1, or more when interleaved), M micro
batches. Chunk c of stage p is virtual stage v = c P + p: a micro batch visits 0, 1, ..., C P - 1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Action:
    """Forward or backward of one micro batch through one of a stage's chunks."""

    is_forward: bool
    chunk: int
    micro_batch: int


# The action of every stage in one tick; None if the stage waits.
Tick = tuple[Action | None, ...]


def split_layers(
    num_layers: int, num_stages: int, *, first: int | None = None, last: int | None = None
) -> list[range]:
    """Return the layers of every (virtual) stage, as even as possible.

    Layers that are left over go to the earlier stages, because the last one also has the output
    layer.

    Args:
        num_layers: Layers of the model.
        num_stages: Stages to split them over.
        first: Layers of the first stage, where not an equal part.
        last: Layers of the last stage, likewise.

    Raises:
        ValueError: A stage would have no layer, or layers would be left over.
    """
    wanted = ((0, first), (num_stages - 1, last))
    given = [(stage, size) for stage, size in wanted if size is not None]
    sizes = dict(given)
    free = [stage for stage in range(num_stages) if stage not in sizes]
    left = num_layers - sum(sizes.values())
    is_stated_twice = any(sizes[stage] != size for stage, size in given)  # of one stage alone
    if left < len(free) or (left and not free) or is_stated_twice:
        raise ValueError(
            f"{num_layers} layers cannot be split over {num_stages} pipeline stages"
            + "".join(f", {size} in stage {stage}" for stage, size in given)
        )
    for position, stage in enumerate(free):
        sizes[stage] = left // len(free) + (position < left % len(free))
    bounds = accumulate((sizes[stage] for stage in range(num_stages)), initial=0)
    return [range(start, stop) for start, stop in pairwise(bounds)]


def one_forward_one_backward(
    stage: int, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1
) -> list[Action]:
    """Return a stage's training actions in order: warm-up forwards, then one of each in turn.

    With one chunk a stage holds the activations of at most P - stage micro batches, and waits for
    P - 1 forwards and backwards in all. With C chunks it waits for a C-th of that, sends C times as
    much and holds the activations of up to (C - 1) P + 2 (P - stage) - 1 chunks, or a little more
    where P does not divide M.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), sections 2.2.1 and 2.2.2.
    """
    forwards = forward_only(
        num_stages=num_stages, num_micro_batches=num_micro_batches, num_chunks=num_chunks
    )
    backwards = [Action(False, num_chunks - 1 - each.chunk, each.micro_batch) for each in forwards]
    num_warmup = num_stages - stage - 1
    if num_chunks > 1:
        largest = max(len(group) for group in _groups(num_micro_batches, num_stages))
        num_warmup = 2 * num_warmup + (num_chunks - 1) * largest
    num_warmup = min(num_warmup, len(forwards))
    order = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - num_warmup :]


def forward_only(*, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> list[Action]:
    """Return the forwards of any stage in order: group by group, each through all chunks."""
    return [
        Action(True, chunk, micro_batch)
        for group in _groups(num_micro_batches, num_stages)
        for chunk in range(num_chunks)
        for micro_batch in group
    ]


def _groups(num_micro_batches: int, num_stages: int) -> list[range]:
    """Return the micro batches in groups; a group passes one chunk of all stages, then the next.

    A group of fewer than P micro batches would be due at the first stage again before the last
    stage has finished with it, and stall the first stage. So the remainder of M / P is spread over
    the groups instead of being a short group of its own.
    """
    num_groups = max(1, num_micro_batches // num_stages)
    bounds = (num_micro_batches * group // num_groups for group in range(num_groups + 1))
    return [range(start, stop) for start, stop in pairwise(bounds)]


@lru_cache(maxsize=8)
def timetable(
    *, num_stages: int, num_micro_batches: int, num_chunks: int = 1, has_backward: bool = True
) -> tuple[Tick, ...]:
    """Return what all stages do, tick by tick, as if every action took one tick.

    An action's result is sent at the end of its tick. If all ranks exchange what each tick says, in
    the order of the ticks, then both sides of every pair post their sends and receives in the same
    order. So no ranks can wait for each other in a circle, however long an action really takes.
    """
    sizes = {"num_stages": num_stages, "num_micro_batches": num_micro_batches}
    queues = [
        deque(
            one_forward_one_backward(stage, **sizes, num_chunks=num_chunks)
            if has_backward
            else forward_only(**sizes, num_chunks=num_chunks)
        )
        for stage in range(num_stages)
    ]
    last = num_stages * num_chunks - 1
    done: set[tuple[bool, int, int]] = set()
    ticks: list[Tick] = []
    while any(queues):
        tick = tuple(
            queue[0] if queue and _is_ready(queue[0], stage, num_stages, last, done) else None
            for stage, queue in enumerate(queues)
        )
        assert any(tick), "the schedule waits for itself"
        for stage, action in enumerate(tick):
            if action is not None:
                queues[stage].popleft()
                virtual = action.chunk * num_stages + stage
                done.add((action.is_forward, virtual, action.micro_batch))
        ticks.append(tick)
    return tuple(ticks)


def _is_ready(
    action: Action, stage: int, num_stages: int, last: int, done: set[tuple[bool, int, int]]
) -> bool:
    virtual = action.chunk * num_stages + stage
    if action.is_forward:
        return virtual == 0 or (True, virtual - 1, action.micro_batch) in done
    if virtual == last:
        return (True, virtual, action.micro_batch) in done
    return (False, virtual + 1, action.micro_batch) in done
