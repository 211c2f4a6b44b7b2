"""The training loop: one optimizer step after another, with evaluations and saves in between.

The loss of an iteration is the mean over the supervised tokens of the global batch, and the
gradients are those of this loss, however batch and model are split over the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemotron.steps._tensor_parallel.collectives import all_gather, all_reduce
from nemotron.steps._training.adamw import FlatAdamW
from nemotron.steps._training.batches import (
    MicroBatch,
    PackedSplit,
    collate,
    split_batch,
)
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.flat_adapter import FlatAdapter
from nemotron.steps._training.flops import lora_flops
from nemotron.steps._training.metrics import MetricsLog, peak_memory_bytes
from nemotron.steps._training.pipeline import PipelineStage, WeightedBatch
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.read_ahead import ReadAhead
from nemotron.steps._training.schedule import Schedule
from nemotron.steps._training.trainer_state import gather_moments, load_moments
from nemotron.steps._training.validation import Best, Validation


class LossNotFiniteError(ArithmeticError):
    """A loss or gradient is infinite or not a number; raised on every rank, before what uses it."""


class NothingToValidateError(ValueError):
    """The rows of an evaluation have no supervised token, and so no loss; raised on every rank."""


@dataclass(frozen=True)
class BatchSettings:
    """Batch sizes in packed rows, and how the loss of a global batch is normalised.

    With ``calculate_per_token_loss`` it is the mean over all supervised tokens of the global batch;
    without, each micro batch's mean is taken first and then the mean over the micro batches.
    """

    global_batch_size: int
    micro_batch_size: int
    calculate_per_token_loss: bool


@dataclass(frozen=True)
class AdamSettings:
    """AdamW with decoupled weight decay, and the bound on the global gradient norm (0: none).

    ``lora_plus_lr_ratio`` is the learning rate of lora_b divided by that of lora_a.
    """

    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    weight_decay: float
    clip_grad: float
    lora_plus_lr_ratio: float = 1.0


@dataclass(frozen=True)
class Intervals:
    """Optimizer steps of the run, and steps between evaluations and saves.

    An evaluation takes ``eval_iters`` global batches at most; every save is evaluated, and the last
    step is saved.
    """

    train_iters: int
    eval_interval: int
    eval_iters: int
    save_interval: int

    def is_saved(self, iteration: int) -> bool:
        """Return whether a save is due after this step."""
        return iteration == self.train_iters or iteration % self.save_interval == 0

    def is_evaluated(self, iteration: int) -> bool:
        """Return whether an evaluation is due after this step."""
        return self.is_saved(iteration) or iteration % self.eval_interval == 0


class StepTotals(NamedTuple):
    """Sums over the global batch of a step."""

    loss: float
    supervised_tokens: float
    tokens: float
    flops: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``iteration`` optimizer steps.

    Attributes:
        iteration: Optimizer steps taken.
        before: Evaluation before the first step; None without a valid split.
        now: Evaluation at this iteration; None unless one was due and was finished.
        is_evaluated: Whether this iteration needs no evaluation any more.
    """

    iteration: int = 0
    before: Validation | None = None
    now: Validation | None = None
    is_evaluated: bool = False


class Trainer:
    """Everything that one optimizer step needs, held together.

    Args:
        model: This rank's layers; their adapters are trained.
        layout: This rank's groups.
        train_rows: The train split.
        valid_rows: The valid split, or None.
        batch: Batch sizes.
        schedule: Learning rate per iteration.
        adam: Optimizer settings.
        seed: Seed of the row order and of dropout.
        metrics: Where losses go.

    Attributes:
        best: The best evaluation so far; None before the first and without a valid split.
    """

    def __init__(
        self,
        model: PipelineStage,
        *,
        layout: Layout,
        train_rows: PackedSplit,
        valid_rows: PackedSplit | None,
        batch: BatchSettings,
        schedule: Schedule,
        adam: AdamSettings,
        seed: int,
        metrics: MetricsLog,
    ) -> None:
        self.model, self.layout, self.batch = model, layout, batch
        self.train_rows, self.valid_rows = train_rows, valid_rows
        self.schedule, self.adam, self.seed, self.metrics = schedule, adam, seed, metrics
        self.best: Best | None = None
        self._batches = ReadAhead(self._read)
        assert model.lora is not None  # a model without an adapter is not trained
        self.flops = lora_flops(model.config, model.lora)
        self.adapter = FlatAdapter(
            (each for linear in model.adapted_linears() for each in linear.lora_parameters()),
            layout,
        )
        self.optimizer = FlatAdamW(
            self.adapter,
            betas=(adam.adam_beta1, adam.adam_beta2),
            eps=adam.adam_eps,
            weight_decay=adam.weight_decay,
            lora_plus_lr_ratio=adam.lora_plus_lr_ratio,
        )

    def run(
        self,
        intervals: Intervals,
        save: Callable[[Progress], None],
        *,
        start: Progress,
        stop: StopRequest,
    ) -> Progress:
        """Train from ``start`` to the end, or to the boundary at which the ranks agree to stop.

        Args:
            intervals: Length of the run, and when it evaluates and saves.
            save: Called at every save on every rank.
            start: Where the run stands.
            stop: Asked after every step and during evaluations.

        Returns:
            Where the run stands now.

        Raises:
            LossNotFiniteError: A loss or gradient is not finite.
            NothingToValidateError: An evaluation has no loss.
            RuntimeError: Copies of a factor differ between ranks.
        """
        self._check_replicas()
        progress = start
        if not start.is_evaluated:
            progress = self._evaluate_start(start, intervals, stop)
            # A run that was stopped between its last step and that step's evaluation.
            if 0 < start.iteration == intervals.train_iters and not stop.is_agreed:
                save(progress)
        while progress.iteration < intervals.train_iters and not stop.is_agreed:
            iteration = progress.iteration + 1
            self.step(iteration, has_next=iteration < intervals.train_iters)
            # Here, and before each batch of an evaluation: whatever is agreed on is saved below.
            stop.agree()
            is_due = intervals.is_evaluated(iteration)
            now = None
            if is_due and not stop.is_agreed:
                now = self._validate(iteration, intervals.eval_iters, stop)
            is_evaluated = not (is_due and stop.is_agreed)
            progress = Progress(iteration, progress.before, now, is_evaluated)
            if intervals.is_saved(iteration) or stop.is_agreed:
                self._check_replicas()
                save(progress)
        return progress

    def step(self, iteration: int, *, has_next: bool = False) -> None:
        """Take one optimizer step; ``iteration`` counts from 1.

        With ``has_next``, the next step's rows are read in the meantime.
        """
        started = time.perf_counter()
        self.adapter.zero_gradients()
        own_loss, totals = self._accumulate_gradients(iteration, has_next)
        lm_loss = totals.loss / max(totals.supervised_tokens, 1.0)
        own = torch.stack([own_loss, self.adapter.gradients.sum(dtype=torch.float64)])
        self.adapter.reduce_gradients()
        if self.batch.calculate_per_token_loss:
            self.adapter.gradients.div_(max(totals.supervised_tokens, 1.0))
        grad_norm = self.adapter.gradient_norm()
        if not (math.isfinite(lm_loss) and math.isfinite(grad_norm)):
            ranks = self._not_finite_on(own)
            raise LossNotFiniteError(
                f"iteration {iteration}: loss {lm_loss}, gradient norm {grad_norm}; "
                f"first on rank(s) {ranks}"
            )
        learning_rate = self._update(iteration, grad_norm)
        values = {"lm_loss": lm_loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        seconds = time.perf_counter() - started
        self.metrics.step(iteration, values | self._throughput(iteration, totals, seconds))

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's moments by name, whole, on the first rank; a collective."""
        return gather_moments(self.model, self.adapter, self.optimizer, self.layout)

    def load_moments(self, directory: Path, iteration: int) -> None:
        """Set AdamW's state to what was saved at ``iteration``."""
        load_moments(directory, self.model, self.adapter, self.optimizer, iteration=iteration)

    def _evaluate_start(self, start: Progress, intervals: Intervals, stop: StopRequest) -> Progress:
        """Make the evaluation that is due before the first step: at 0 that of the base alone."""
        now = self._validate(start.iteration, intervals.eval_iters, stop)
        before = start.before if start.iteration else now
        return Progress(start.iteration, before, now, not stop.is_agreed)

    def _accumulate_gradients(self, iteration: int, has_next: bool) -> tuple[Tensor, StepTotals]:
        """Return this rank's loss sum, fp64, and the sums over the global batch."""
        read = self._batches.take(iteration, has_next=has_next)
        batches = [replace(each, micro=each.micro.to(self.layout.device)) for each in read]
        loss_sum = self.model.train(batches)
        counts = torch.tensor([self._counts(batch.micro) for batch in batches], dtype=torch.float64)
        return loss_sum, StepTotals(*self._totals(loss_sum, counts.sum(dim=0)).tolist())

    def _read(self, iteration: int) -> list[WeightedBatch]:
        """Return this rank's micro batches of an iteration, on the CPU."""
        rows = self.train_rows.global_batch(
            iteration - 1,
            global_batch_size=self.batch.global_batch_size,
            seed=self.seed,
        )
        micro_batches = split_batch(
            rows,
            micro_batch_size=self.batch.micro_batch_size,
            data_rank=self.layout.data.rank,
            data_size=self.layout.data.size,
        )
        return [self._weighted(iteration, pairs) for pairs in micro_batches]

    def _counts(self, micro: MicroBatch) -> tuple[int, int, float]:
        """Return supervised tokens, tokens and floating-point operations of a micro batch."""
        supervised = len(micro.supervised)
        return supervised, len(micro.tokens), self.flops.of(micro.cu_seqlens, supervised)

    def _weighted(self, iteration: int, positions_and_rows: list[tuple[int, int]]) -> WeightedBatch:
        micro = collate([self.train_rows[row] for _, row in positions_and_rows])
        keys = [f"{self.seed}/{iteration}/{position}" for position, _ in positions_and_rows]
        weight = 1.0
        if not self.batch.calculate_per_token_loss:
            num_micro_batches = self.batch.global_batch_size // self.batch.micro_batch_size
            weight = 1.0 / (max(len(micro.supervised), 1) * num_micro_batches)
        return WeightedBatch(micro, micro.dropout_rows(keys), weight)

    def _totals(self, loss_sum: Tensor, counts: Tensor) -> Tensor:
        """Return sums over the replicas: of the last stage's loss sum, and of counts; [1 + n]."""
        totals = torch.cat([loss_sum.reshape(1), counts.to(loss_sum)])
        if self.layout.pipeline.rank != self.layout.pipeline.size - 1:
            totals.zero_()
        return all_reduce(all_reduce(totals, self.layout.data), self.layout.pipeline)

    def _throughput(self, iteration: int, totals: StepTotals, seconds: float) -> dict[str, Any]:
        """Return what a step worked on and how fast; also the peak memory, if the step is shown."""
        values: dict[str, Any] = {
            "consumed_samples": iteration * self.batch.global_batch_size,
            "tokens": int(totals.tokens),
            "supervised_tokens": int(totals.supervised_tokens),
            "seconds": seconds,
            "tokens_per_second": totals.tokens / seconds,
            "supervised_tokens_per_second": totals.supervised_tokens / seconds,
            "tflops_per_rank": totals.flops / seconds / self.layout.world.size / 1e12,
        }
        if self.metrics.is_shown(iteration):  # not at every step: this is a collective
            own = torch.tensor(peak_memory_bytes(self.layout.device), device=self.layout.device)
            values["peak_memory_bytes"] = int(all_gather(own, self.layout.world).max())
        return values

    def _not_finite_on(self, own: Tensor) -> list[int]:
        """Return the ranks whose own sums, taken before any exchange, are not finite."""
        finite = all_gather(own.isfinite().all().int(), self.layout.world).tolist()
        return [rank for rank, is_finite in enumerate(finite) if not is_finite]

    def _update(self, iteration: int, grad_norm: float) -> float:
        """Clip the gradients and step the optimizer; return the learning rate that was used."""
        if self.adam.clip_grad:
            coefficient = self.adam.clip_grad / (grad_norm + 1e-6)
            self.adapter.gradients.mul_(min(1.0, coefficient))
        learning_rate = self.schedule.at(iteration - 1)
        self.optimizer.step(learning_rate)
        return learning_rate

    @torch.no_grad()
    def _validate(self, iteration: int, eval_iters: int, stop: StopRequest) -> Validation | None:
        """Return the loss on at most ``eval_iters`` global batches of the valid split.

        None if there is no valid split, or if the ranks agreed to stop in the meantime.

        Raises:
            LossNotFiniteError: The loss is not finite; nothing of such an adapter must be saved.
            NothingToValidateError: No token is supervised; a loss of 0 would stay the best forever.
        """
        if self.valid_rows is None:
            return None
        num_rows = min(len(self.valid_rows), eval_iters * self.batch.global_batch_size)
        totals = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        rows_at_once = self.batch.global_batch_size
        for first_row in range(0, num_rows, rows_at_once):
            if stop.agree():
                return None
            last_row = min(first_row + rows_at_once, num_rows)
            rows = range(first_row + self.layout.data.rank, last_row, self.layout.data.size)
            batches = [collate([self.valid_rows[row]]).to(self.layout.device) for row in rows]
            supervised = torch.tensor([sum(len(micro.supervised) for micro in batches)])
            totals += self._totals(self.model.evaluate(batches), supervised)
        loss_sum, supervised_tokens = totals.tolist()
        if not supervised_tokens:
            problem = f"the first {num_rows} rows of the valid split have no supervised token"
            raise NothingToValidateError(problem)
        result = Validation(loss_sum / supervised_tokens, int(supervised_tokens))
        if not math.isfinite(result.lm_loss):
            raise LossNotFiniteError(f"iteration {iteration}: validation loss {result.lm_loss}")
        is_best = self.best is None or self.best.is_beaten_by(result)
        if is_best:
            self.best = Best(iteration, result.lm_loss, result.supervised_tokens)
        self.metrics.validation(
            iteration, result.lm_loss, result.supervised_tokens, is_best=is_best
        )
        return result

    def _check_replicas(self) -> None:
        difference = self.adapter.replica_difference()
        if difference != 0.0:
            raise RuntimeError(f"copies of an adapter differ between ranks by {difference}")
