"""nemotron.steps._training.loop: what one optimizer step and one evaluation do, on one rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.batches import MicroBatch, PackedSplit, collate
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.loop import (
    AdamSettings,
    BatchSettings,
    Intervals,
    LossNotFiniteError,
    NothingToValidateError,
    Progress,
    Trainer,
)
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.pipeline import PipelineStage, WeightedBatch
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.schedule import Schedule

ALONE, CPU, VOCABULARY, NUM_ROWS = ProcessGroup(), torch.device("cpu"), 16, 6
LAYOUT = Layout(ALONE, ALONE, ALONE, ALONE, ALONE, CPU)
SIZES = DecoderConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=4,
    vocab_size=VOCABULARY,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
    rope_scaling=None,
    share_embeddings_and_output_weights=False,
    max_position_embeddings=16,
)
# None of them as torch or the schema has it by default.
ADAM = {"betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.5}
CLIP_GRAD = 0.01


class Record:
    """Takes the place of the metrics log: what was said of each step and evaluation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[tuple[int, int]] = []
        self.valid_losses: list[float] = []

    def step(self, iteration: int, values: dict[str, Any]) -> None:
        self.steps.append(values)

    def is_shown(self, iteration: int) -> bool:
        return False

    def validation(
        self, iteration: int, lm_loss: float, supervised_tokens: int, *, is_best: bool
    ) -> None:
        self.validations.append((iteration, supervised_tokens))
        self.valid_losses.append(lm_loss)


def trainer_of(
    directory: Path,
    record: Record,
    *,
    lora_plus_lr_ratio: float = 1.0,
    dropout: float = 0.0,
    global_batch_size: int = 2,
    recompute: bool = False,
) -> Trainer:
    """Return a trainer of a random model; row i of both splits has i + 1 supervised tokens."""
    torch.manual_seed(0)
    rows = [[[*range(8)], [1] * (i + 1) + [0] * (7 - i), [0]] for i in range(NUM_ROWS)]
    types = (pa.int32(), pa.uint8(), pa.int32())
    by_column = zip(*rows, strict=True)
    columns = [pa.array(c, pa.list_(t)) for c, t in zip(by_column, types, strict=True)]
    table = pa.table(columns, names=["input_ids", "loss_mask", "seq_start_id"])
    pq.write_table(table, directory / "shard.parquet")
    lora = LoraTargets(["linear_qkv", "linear_fc2"], LoraSpec(2, 4.0, dropout))
    model = GPTModel(SIZES, lora=lora, group=ALONE, dtype=torch.float64, recompute=recompute)
    for tensor in (*model.buffers(), *model.parameters()):
        tensor.data.normal_(std=0.5)
    split = PackedSplit(directory, vocab_size=VOCABULARY)
    beta1, beta2 = ADAM["betas"]
    return Trainer(
        PipelineStage([model], group=ALONE, device=CPU),
        layout=LAYOUT,
        train_rows=split,
        valid_rows=split,
        batch=BatchSettings(global_batch_size, 1, calculate_per_token_loss=True),
        schedule=Schedule(1e-1, 1e-2, 0, 4, "linear"),
        adam=AdamSettings(
            beta1, beta2, ADAM["eps"], ADAM["weight_decay"], CLIP_GRAD, lora_plus_lr_ratio
        ),
        seed=1,
        metrics=cast(MetricsLog, record),
    )


def test_an_evaluation_that_is_not_finite_stops_before_anything_is_saved(tmp_path: Path) -> None:
    record, saved = Record(), list[Progress]()
    trainer = trainer_of(tmp_path, record)
    intervals = Intervals(train_iters=2, eval_interval=1, eval_iters=1, save_interval=1)
    update = trainer._update

    def breaks(iteration: int, grad_norm: float) -> float:
        trainer.adapter.values.data.fill_(torch.nan)
        return update(iteration, grad_norm)

    trainer._update = breaks
    with pytest.raises(LossNotFiniteError, match="iteration 1: validation loss nan"):
        trainer.run(intervals, saved.append, start=Progress(), stop=StopRequest(LAYOUT))
    assert len(record.steps) == 1
    assert not saved


def test_an_evaluation_without_a_supervised_token_is_no_loss_of_0(tmp_path: Path) -> None:
    record = Record()
    trainer = trainer_of(tmp_path, record)
    (tmp_path / "valid").mkdir()
    rows = pq.read_table(tmp_path / "shard.parquet").to_pydict()
    masks = [[0] * 8] * 2 + rows["loss_mask"][2:]
    pq.write_table(pa.table(rows | {"loss_mask": masks}), tmp_path / "valid" / "shard.parquet")
    trainer.valid_rows = PackedSplit(tmp_path / "valid", vocab_size=VOCABULARY)
    intervals = Intervals(train_iters=1, eval_interval=1, eval_iters=1, save_interval=1)
    with pytest.raises(NothingToValidateError, match="first 2 rows of the valid split"):
        trainer.run(intervals, lambda _: None, start=Progress(), stop=StopRequest(LAYOUT))
    assert (record.steps, record.validations, trainer.best) == ([], [], None)
    intervals = replace(intervals, eval_iters=2)
    trainer.run(intervals, lambda _: None, start=Progress(), stop=StopRequest(LAYOUT))
    assert record.validations == [(0, 3 + 4), (1, 3 + 4)]


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_steps_are_those_of_adamw_on_clipped_gradients(tmp_path: Path, ratio: float) -> None:
    record = Record()
    trainer = trainer_of(tmp_path, record, lora_plus_lr_ratio=ratio)
    before = trainer.adapter.views(trainer.adapter.values.detach().clone())
    wanted = {name: value.requires_grad_() for name, value in before.items()}
    by_factor = [[wanted[n] for n in wanted if n.endswith(f)] for f in ("lora_a", "lora_b")]
    groups = [{"params": each, "lr": 0.0} for each in by_factor]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    for iteration, rate in enumerate((0.1, 0.0775, 0.055), start=1):
        trainer.step(iteration)
        assert record.steps[-1]["grad_norm"] > CLIP_GRAD
        assert trainer.adapter.gradients.norm() == pytest.approx(CLIP_GRAD, rel=1e-4)
        for name, gradient in trainer.adapter.views(trainer.adapter.gradients).items():
            wanted[name].grad = gradient
        for group, factor in zip(optimizer.param_groups, (1.0, ratio), strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        for name, value in trainer.adapter.views(trainer.adapter.values).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("eval_iters", "num_rows"), [(1, 2), (2, 4), (32, NUM_ROWS)])
def test_an_evaluation_takes_so_many_global_batches_at_most(
    tmp_path: Path, eval_iters: int, num_rows: int
) -> None:
    record = Record()
    intervals = Intervals(train_iters=2, eval_interval=9, eval_iters=eval_iters, save_interval=9)
    saved: list[Progress] = []
    trainer_of(tmp_path, record).run(
        intervals, saved.append, start=Progress(), stop=StopRequest(LAYOUT)
    )
    supervised = sum(range(1, num_rows + 1))
    assert record.validations == [(0, supervised), (2, supervised)]
    assert [each.iteration for each in saved] == [2]


def test_a_run_told_to_stop_in_its_last_step_is_evaluated_and_saved_again_when_it_goes_on(
    tmp_path: Path,
) -> None:
    intervals = Intervals(train_iters=2, eval_interval=1, eval_iters=1, save_interval=9)
    record, saved = Record(), list[Progress]()
    trainer = trainer_of(tmp_path, record)
    update = trainer._update

    def is_told(iteration: int, grad_norm: float) -> float:
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(iteration, grad_norm)

    trainer._update = is_told
    with StopRequest(LAYOUT) as stop:
        stopped = trainer.run(intervals, saved.append, start=Progress(), stop=stop)
    assert [(each.iteration, each.now, each.is_evaluated) for each in saved] == [(2, None, False)]
    assert stopped == saved[0]
    ended = trainer.run(intervals, saved.append, start=stopped, stop=StopRequest(LAYOUT))
    assert [each for each, _ in record.validations] == [0, 1, 2]
    assert len(record.steps) == 2
    assert ended == saved[1]
    assert (ended.iteration, ended.before, ended.is_evaluated) == (2, stopped.before, True)
    assert ended.now is not None
    assert ended.now.lm_loss == record.valid_losses[-1]


def test_dropout_is_another_at_each_iteration_and_none_in_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = lambda *_, **__: [*range(NUM_ROWS)]  # noqa: E731 - no epoch has another order
    monkeypatch.setattr(PackedSplit, "global_batch", in_order)
    record, without = Record(), Record()
    trainer = trainer_of(tmp_path, record, dropout=0.5, global_batch_size=NUM_ROWS)
    trainer.schedule = Schedule(1e-30, 0.0, 0, 4, "constant")  # the adapter stays as it is
    only_validate = Intervals(train_iters=0, eval_interval=1, eval_iters=1, save_interval=1)
    plain = trainer_of(tmp_path, without, global_batch_size=NUM_ROWS)
    for each in (trainer, plain):
        each.run(only_validate, lambda _: None, start=Progress(), stop=StopRequest(LAYOUT))
    for iteration in (1, 2):
        trainer.step(iteration)
    assert record.valid_losses == without.valid_losses
    losses = [step["lm_loss"] for step in record.steps]
    assert len({*losses, *record.valid_losses}) == 3


@pytest.mark.parametrize(
    ("moment", "last_step"),
    [("in a step", 2), ("after a step's answer", 3), ("in an evaluation's last batch", 4)],
)
def test_whatever_a_stop_interrupts_the_last_step_taken_is_saved(
    tmp_path: Path, moment: str, last_step: int
) -> None:
    record, saved = Record(), list[Progress]()
    trainer = trainer_of(tmp_path, record)
    train, evaluate = trainer.model.train, trainer.model.evaluate
    evaluated: list[int] = []

    class Stop(StopRequest):
        def agree(self) -> bool:
            agreed = super().agree()
            if moment == "after a step's answer" and len(record.steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return agreed

    def evaluate_and_stop(batches: Sequence[MicroBatch]) -> torch.Tensor:
        evaluated.append(len(record.steps))
        if moment == "in an evaluation's last batch" and evaluated.count(3) == NUM_ROWS // 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(batches)

    def train_and_stop(batches: Sequence[WeightedBatch]) -> torch.Tensor:
        if moment == "in a step" and len(record.steps) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(batches)

    trainer.model.train, trainer.model.evaluate = train_and_stop, evaluate_and_stop
    intervals = Intervals(train_iters=9, eval_interval=3, eval_iters=NUM_ROWS, save_interval=8)
    with Stop(LAYOUT) as stop:
        reached = trainer.run(intervals, saved.append, start=Progress(), stop=stop)
    assert stop.is_agreed
    assert saved == [reached]
    assert len(record.steps) == reached.iteration == last_step


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_recomputation_takes_a_layer_twice_where_there_is_a_backward(
    tmp_path: Path, recompute: bool, times: int
) -> None:
    trainer = trainer_of(tmp_path, Record(), recompute=recompute)
    taken: list[int] = []
    for module in trainer.model.chunks[0].layers:
        module.register_forward_pre_hook(lambda *_: taken.append(1))
    trainer.step(1)
    assert len(taken) == 2 * times  # micro batches
    taken.clear()
    trainer.model.evaluate([collate([trainer.train_rows[0]])])
    assert len(taken) == 1
