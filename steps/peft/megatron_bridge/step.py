"""Entry of peft/megatron_bridge: config in, adapter out. One process per rank, under torchrun."""

from __future__ import annotations

from pathlib import Path

import torch

from nemotron.artifacts import Producer
from nemotron.steps._entry import reporting, run_step
from nemotron.steps._models.gpt import LoraTargets
from nemotron.steps._tensor_parallel.linear import LoraSpec
from nemotron.steps._training.checkpoint import hold_output
from nemotron.steps._training.distributed import open_layout
from nemotron.steps._training.heartbeat import Heartbeat
from nemotron.steps._training.loop import AdamSettings, BatchSettings, Intervals
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.mirror_process import MirrorSettings
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps._training.schedule import Schedule
from nemotron.steps.peft.megatron_bridge.checks import STEP, existing_inputs
from nemotron.steps.peft.megatron_bridge.identity import run_identity
from nemotron.steps.peft.megatron_bridge.schema import Config
from nemotron.steps.peft.megatron_bridge.start import ResumeSettings
from nemotron.steps.peft.megatron_bridge.train import train_adapter


def run(config: Config, produced_by: Producer) -> None:
    """Check the inputs, open the process groups and train."""
    packed_root, base_path = existing_inputs(config)
    peft, optimizer, train = config.peft, config.optimizer, config.train
    checkpoint, output = config.checkpoint, Path(config.checkpoint.save)
    with (
        open_layout(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            data_parallel_size=config.recipe.data_parallel_size,
            timeout_minutes=config.dist.distributed_timeout_minutes,
        ) as layout,
        StopRequest(layout) as stop,
        Heartbeat(layout, config.dist.heartbeat_timeout_seconds) as heartbeat,
        hold_output(layout, output),
        MetricsLog(
            output if layout.is_first else None,
            train_iters=train.train_iters,
            log_interval=config.logger.log_interval,
            config=config.model_dump(mode="json", by_alias=True),
            mirrors=MirrorSettings(**config.logger.model_dump(exclude={"log_interval"})),
        ) as metrics,
        reporting(),
    ):
        train_adapter(
            layout=layout,
            stop=stop,
            heartbeat=heartbeat,
            packed_root=packed_root,
            base_path=base_path,
            output=output,
            lora=LoraTargets(
                peft.target_modules,
                LoraSpec(peft.dim, peft.alpha, peft.dropout, peft.use_rslora),
                rank_pattern=peft.rank_pattern,
                alpha_pattern=peft.alpha_pattern,
            ),
            batch=BatchSettings(
                train.global_batch_size,
                train.micro_batch_size,
                config.model.calculate_per_token_loss,
            ),
            schedule=Schedule(
                lr=optimizer.lr,
                min_lr=optimizer.min_lr,
                warmup_iters=config.lr_warmup_iters,
                decay_iters=config.lr_decay_iters,
                style=config.scheduler.lr_decay_style,
                warmup_init=config.scheduler.lr_warmup_init,
                wsd_decay_iters=config.scheduler.lr_wsd_decay_iters or 0,
                wsd_style=config.scheduler.lr_wsd_decay_style,
            ),
            adam=AdamSettings(
                **optimizer.model_dump(exclude={"lr", "min_lr"}),
                lora_plus_lr_ratio=peft.lora_plus_lr_ratio,
            ),
            intervals=Intervals(
                train.train_iters,
                train.eval_interval,
                train.eval_iters,
                checkpoint.save_interval,
            ),
            seed=config.rng.seed,
            metrics=metrics,
            dtype=torch.bfloat16 if config.mixed_precision == "bf16_mixed" else torch.float32,
            sequence_parallel=config.sequence_parallel,
            recompute=config.model.recompute_granularity == "full",
            num_chunks=config.model.virtual_pipeline_model_parallel_size or 1,
            num_layers_in_first_stage=config.model.num_layers_in_first_pipeline_stage,
            num_layers_in_last_stage=config.model.num_layers_in_last_pipeline_stage,
            base_model_name_or_path=config.hf_model_path,
            produced_by=produced_by,
            resume=ResumeSettings(
                load=checkpoint.other_run,
                ckpt_step=checkpoint.ckpt_step,
                identity=run_identity(config, packed_root, base_path),
                save_optim=checkpoint.save_optim,
                most_recent_k=checkpoint.most_recent_k,
            ),
        )


if __name__ == "__main__":
    raise SystemExit(run_step(STEP, Config, run))
