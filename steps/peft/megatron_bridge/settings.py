"""Translates the config into the settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.loop import AdamSettings, BatchSettings, Intervals
from nemotron.steps._training.schedule import Schedule
from nemotron.steps.peft.megatron_bridge.schema import Config
from nemotron.steps.peft.megatron_bridge.start import ResumeSettings


@dataclass(frozen=True)
class ModelSettings:
    """How the base is held and computed.

    Attributes:
        dtype: dtype of the base and of activations.
        sequence_parallel: Whether activations between the linears are split over the sequence.
        recompute: Whether layers are computed again in the backward pass.
        num_chunks: Parts of the model on each pipeline stage; with more than one, the schedule is
            interleaved.
        num_layers_in_first_stage: Layers of the first pipeline stage; None for an equal share.
        num_layers_in_last_stage: Layers of the last pipeline stage, likewise.
    """

    dtype: torch.dtype
    sequence_parallel: bool
    recompute: bool
    num_chunks: int
    num_layers_in_first_stage: int | None
    num_layers_in_last_stage: int | None


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, independent of where it runs and what it reads.

    Attributes:
        lora: Adapters, and the linears that get one.
        model: Type of the base, and how it is split and computed.
        batch: Batch sizes.
        schedule: Learning rate per iteration.
        adam: Optimizer settings.
        intervals: Length of the run, and when it evaluates and saves.
        seed: Seed of the adapter, the row order and dropout.
        resume: What the run resumes from, and what it saves so that it can be resumed.
        base_model_name_or_path: The base that the adapter's config names; None for the source of
            the base.
    """

    lora: LoraTargets
    model: ModelSettings
    batch: BatchSettings
    schedule: Schedule
    adam: AdamSettings
    intervals: Intervals
    seed: int
    resume: ResumeSettings
    base_model_name_or_path: str | None


def run_settings(config: Config, identity: dict[str, Any]) -> RunSettings:
    """Return the settings of a run; ``identity`` must be that of a save that it resumes from."""
    return RunSettings(
        lora=lora_targets(config),
        model=model(config),
        batch=batch(config),
        schedule=schedule(config),
        adam=adam(config),
        intervals=intervals(config),
        seed=config.rng.seed,
        resume=resume(config, identity),
        base_model_name_or_path=config.hf_model_path,
    )


def lora_targets(config: Config) -> LoraTargets:
    """Return the adapters, and the linears that get one."""
    peft = config.peft
    return LoraTargets(
        peft.target_modules,
        LoraSpec(peft.dim, peft.alpha, peft.dropout, peft.use_rslora),
        rank_pattern=peft.rank_pattern,
        alpha_pattern=peft.alpha_pattern,
    )


def model(config: Config) -> ModelSettings:
    """Return how the base is held and computed."""
    values = config.model
    return ModelSettings(
        dtype=torch.bfloat16 if config.mixed_precision == "bf16_mixed" else torch.float32,
        sequence_parallel=config.sequence_parallel,
        recompute=config.recompute_granularity == "full",
        num_chunks=values.virtual_pipeline_model_parallel_size or 1,
        num_layers_in_first_stage=values.num_layers_in_first_pipeline_stage,
        num_layers_in_last_stage=values.num_layers_in_last_pipeline_stage,
    )


def batch(config: Config) -> BatchSettings:
    """Return the batch sizes."""
    train = config.train
    per_token = config.model.calculate_per_token_loss
    return BatchSettings(train.global_batch_size, train.micro_batch_size, per_token)


def schedule(config: Config) -> Schedule:
    """Return the learning rate per iteration."""
    optimizer, scheduler = config.optimizer, config.scheduler
    return Schedule(
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_iters=config.lr_warmup_iters,
        decay_iters=config.lr_decay_iters,
        style=scheduler.lr_decay_style,
        warmup_init=scheduler.lr_warmup_init,
        wsd_decay_iters=scheduler.lr_wsd_decay_iters or 0,
        wsd_style=scheduler.lr_wsd_decay_style,
    )


def adam(config: Config) -> AdamSettings:
    """Return the optimizer's settings."""
    values = config.optimizer.model_dump(exclude={"lr", "min_lr"})
    return AdamSettings(**values, lora_plus_lr_ratio=config.peft.lora_plus_lr_ratio)


def intervals(config: Config) -> Intervals:
    """Return the length of the run, and when it evaluates and saves."""
    train = config.train
    save_interval = config.checkpoint.save_interval
    return Intervals(train.train_iters, train.eval_interval, train.eval_iters, save_interval)


def resume(config: Config, identity: dict[str, Any]) -> ResumeSettings:
    """Return what a run resumes from; ``identity`` must be that of the save."""
    checkpoint = config.checkpoint
    return ResumeSettings(
        load=checkpoint.other_run,
        ckpt_step=checkpoint.ckpt_step,
        identity=identity,
        save_optim=checkpoint.save_optim,
        most_recent_k=checkpoint.most_recent_k,
    )
