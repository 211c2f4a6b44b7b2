"""A pipeline stage: the model parts that this rank holds, and the micro batches that pass through.

The activations of a micro batch go from stage to stage and its gradients come back, in the order of
``pipeline_schedule``. All ranks of a replica read the same rows. So each rank knows the shape of
what it receives, only activations and gradients are sent, rows need no padding to a common length,
and micro batches may have any sizes. A single stage runs the same code and sends nothing.

S tokens, H hidden, T tensor-parallel size, P stages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nemotron.steps._models.gpt import GPTModel
from nemotron.steps._tensor_parallel.collectives import ProcessGroup, all_reduce, wait_for
from nemotron.steps._tensor_parallel.dropout import DropoutRows
from nemotron.steps._tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from nemotron.steps._training.batches import MicroBatch
from nemotron.steps._training.pipeline_schedule import Action, Tick, timetable

# Sends that may be in flight before a rank waits for the oldest: two in each direction. It bounds
# what a fast first stage holds when nothing comes back to it, as in an evaluation.
_SENDS_AT_ONCE = 4


@dataclass(frozen=True)
class WeightedBatch:
    """A micro batch, its dropout (None: off), and the weight of its loss in the gradient."""

    micro: MicroBatch
    dropout: DropoutRows | None = None
    weight: float = 1.0


class PipelineStage:
    """This rank's chunks of the model, in the order in which a micro batch visits them.

    Args:
        chunks: One model part, or several that alternate with those of the other stages.
        group: The ranks of this replica's stages, in the order of the stages.
        device: Device on which activations are received.
    """

    def __init__(
        self, chunks: Sequence[GPTModel], *, group: ProcessGroup, device: torch.device
    ) -> None:
        self.chunks, self.group, self.device = chunks, group, device
        self.config, self.lora = chunks[0].config, chunks[0].lora
        # NCCL wants all ranks of a group in its first operation; later ones are between two ranks.
        all_reduce(torch.zeros(1, device=device), group)

    def adapted_linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Return this rank's linears that carry an adapter."""
        return [linear for chunk in self.chunks for linear in chunk.adapted_linears()]

    def train(self, batches: Sequence[WeightedBatch]) -> Tensor:
        """Add the gradients of ``sum(weight * loss)`` to those of all stages' adapters.

        Returns:
            The unweighted sum of the losses, fp64; zero on all stages but the last.
        """
        return self._run(batches, has_backward=True)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Return the sum of the losses, fp64; zero on all stages but the last."""
        return self._run([WeightedBatch(micro) for micro in batches], has_backward=False)

    def _run(self, batches: Sequence[WeightedBatch], *, has_backward: bool) -> Tensor:
        # All stages see the same rows, so all of them leave out the same ones: those without a
        # supervised token.
        batches = [batch for batch in batches if len(batch.micro.supervised)]
        stage = self.group.rank
        ticks = timetable(
            num_stages=self.group.size,
            num_micro_batches=len(batches),
            num_chunks=len(self.chunks),
            has_backward=has_backward,
        )
        work = _Work(self, batches, has_backward=has_backward)
        exchange = _Exchange(self, batches)
        for tick in ticks:
            action, result = tick[stage], None
            if action is not None:
                received = exchange.take(action)
                perform = work.forward if action.is_forward else work.backward
                result = perform(action, received)
            exchange.start(tick, result)
        exchange.finish()
        return work.loss_sum


class _Graph(NamedTuple):
    """The input of a forward, and where its result is in the autograd graph."""

    received: Tensor | None
    edge: GradientEdge | None


class _Work:
    """Performs the actions of one schedule; keeps what a forward leaves for its backward."""

    def __init__(
        self, stage: PipelineStage, batches: Sequence[WeightedBatch], *, has_backward: bool
    ) -> None:
        self._chunks, self._batches, self._has_backward = stage.chunks, batches, has_backward
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=stage.device)

    def forward(self, action: Action, received_SH: Tensor | None) -> Tensor | None:
        """Return what the next stage gets, [S / T, H] or [S, H]; None after the last."""
        model, batch = self._chunks[action.chunk], self._batches[action.micro_batch]
        micro = batch.micro
        if received_SH is not None and self._has_backward:
            received_SH.requires_grad_()
        out = model(micro.tokens, micro.cu_seqlens, batch.dropout, received_SH)
        if model.is_last:
            loss_K = model.loss(out.index_select(0, micro.supervised), micro.labels)
            self.loss_sum += loss_K.detach().double().sum()
            out = loss_K.sum().mul(batch.weight)
        if self._has_backward:
            # The edge, not the tensor: backward only needs the graph, and what was sent is freed.
            edge = get_gradient_edge(out) if out.requires_grad else None
            self._graphs[action.chunk, action.micro_batch] = _Graph(received_SH, edge)
        return None if model.is_last else out.detach()

    def backward(self, action: Action, received_SH: Tensor | None) -> Tensor | None:
        """Return the gradient that the previous stage gets; None on the first stage.

        The last stage receives no gradient: its result is the loss.
        """
        graph = self._graphs.pop((action.chunk, action.micro_batch))
        if graph.edge is not None:  # a first stage without adapters has nothing to do
            # In this thread, also on a GPU: the heartbeat watches what this thread does.
            with torch.autograd.set_multithreading_enabled(False):
                torch.autograd.backward([graph.edge], [received_SH])
        return None if graph.received is None else graph.received.grad


class _Message(NamedTuple):
    """The destination of a result: the stage that receives it, and the action that needs it."""

    stage: int
    action: Action


class _Exchange:
    """Sends and receives of one schedule, tick by tick, without waiting for them."""

    def __init__(self, stage: PipelineStage, batches: Sequence[WeightedBatch]) -> None:
        self._chunks, self._group, self._device = stage.chunks, stage.group, stage.device
        self._batches = batches
        self._inbox: dict[Action, tuple[Tensor, list[dist.Work]]] = {}
        self._sends: deque[tuple[Tensor, list[dist.Work]]] = deque()

    def take(self, action: Action) -> Tensor | None:
        """Return the input of an action once it has arrived; None if it gets none from a stage."""
        if action not in self._inbox:
            return None
        tensor, works = self._inbox.pop(action)
        wait_for(works)
        return tensor

    def start(self, tick: Tick, result: Tensor | None) -> None:
        """Start the transfers of a tick: this rank's result, and what is sent to this rank."""
        operations: list[dist.P2POp] = []
        outgoing, incoming = None, {}
        for sender, message in self._messages(tick):
            if sender == self._group.rank:
                assert result is not None
                outgoing = result.contiguous()
                operations.append(self._operation(dist.isend, outgoing, message.stage))
            elif message.stage == self._group.rank:
                buffer = incoming[message.action] = self._empty(message.action)
                operations.append(self._operation(dist.irecv, buffer, sender))
        works = dist.batch_isend_irecv(operations) if operations else []
        self._inbox |= {action: (buffer, works) for action, buffer in incoming.items()}
        if outgoing is not None:
            self._sends.append((outgoing, works))
        self._settle(_SENDS_AT_ONCE)

    def finish(self) -> None:
        """Wait until everything sent has arrived."""
        self._settle(0)

    def _settle(self, num_left: int) -> None:
        while len(self._sends) > num_left:
            _, works = self._sends.popleft()
            wait_for(works)

    def _messages(self, tick: Tick) -> Iterator[tuple[int, _Message]]:
        """Yield (sender, message) of every result of a tick that another stage works on."""
        num_stages = len(tick)
        last = num_stages * len(self._chunks) - 1
        for sender, action in enumerate(tick):
            if action is None:
                continue
            virtual = action.chunk * num_stages + sender + (1 if action.is_forward else -1)
            if 0 <= virtual <= last:
                chunk, stage = divmod(virtual, num_stages)
                yield sender, _Message(stage, Action(action.is_forward, chunk, action.micro_batch))

    def _operation(self, kind: Callable[..., Any], tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group.group, group_peer=peer)

    def _empty(self, action: Action) -> Tensor:
        model, micro = self._chunks[action.chunk], self._batches[action.micro_batch].micro
        shape = (model.rows_per_rank(len(micro.tokens)), model.config.hidden_size)
        return torch.empty(shape, dtype=model.dtype, device=self._device)
