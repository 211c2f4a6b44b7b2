"""Entry of peft/megatron_bridge: config in, adapter out. One process per rank, under torchrun."""

from __future__ import annotations

from nemotron.artifacts import Producer
from nemotron.steps._entry import reporting, run_step
from nemotron.steps._training.checkpoint import hold_output
from nemotron.steps._training.distributed import leave_process, open_layout
from nemotron.steps._training.heartbeat import Heartbeat
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.mirror_process import MirrorSettings
from nemotron.steps._training.preemption import StopRequest
from nemotron.steps.peft.megatron_bridge.checks import STEP, existing_inputs
from nemotron.steps.peft.megatron_bridge.identity import run_identity
from nemotron.steps.peft.megatron_bridge.schema import Config
from nemotron.steps.peft.megatron_bridge.settings import run_settings
from nemotron.steps.peft.megatron_bridge.train import named_errors, train_adapter


def run(config: Config, produced_by: Producer) -> None:
    """Check the inputs, open the process groups and train."""
    packed_root, base_path = existing_inputs(config)
    output = config.checkpoint.save
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
            train_iters=config.train.train_iters,
            log_interval=config.logger.log_interval,
            config=config.model_dump(mode="json", by_alias=True),
            mirrors=MirrorSettings(**config.logger.model_dump(exclude={"log_interval"})),
        ) as metrics,
        reporting(),
        named_errors(packed_root, output, metrics),
    ):
        train_adapter(
            run_settings(config, run_identity(config, packed_root, base_path)),
            layout=layout,
            packed_root=packed_root,
            base_path=base_path,
            output=output,
            metrics=metrics,
            produced_by=produced_by,
            stop=stop,
            heartbeat=heartbeat,
        )


if __name__ == "__main__":
    leave_process(run_step(STEP, Config, run))
