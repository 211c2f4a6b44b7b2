"""The config of peft/megatron_bridge as a whole, and what follows from several of its sections.

Upstream repeats one fact in several sections (``recipe.seq_length``, ``model.seq_length``,
``dataset.seq_length``). All of these keys are accepted, and those that are set must agree. The code
only reads the properties at the end of ``Config``, so that there is one truth.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nemotron.config import Schema
from nemotron.steps.peft.megatron_bridge.sections import (
    CheckpointConfig,
    CheckpointPatchConfig,
    DatasetConfig,
    DistConfig,
    HfLoadConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    PeftConfig,
    RecipeConfig,
    RngConfig,
    SchedulerConfig,
    TrainConfig,
)


class Config(Schema):
    """Everything that ``peft/megatron_bridge`` reads."""

    recipe: RecipeConfig = RecipeConfig()
    model: ModelConfig = ModelConfig()
    dataset: DatasetConfig = DatasetConfig()
    train: TrainConfig = TrainConfig()
    peft: PeftConfig = PeftConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logger: LoggerConfig = LoggerConfig()
    rng: RngConfig = RngConfig()
    dist: DistConfig = DistConfig()
    mixed_precision: Literal["fp32", "bf16_mixed"] = Field(
        default="fp32",
        description="fp32, or base and activations in bf16 with fp32 master weights of the adapter",
    )
    hf_model_path: str | None = Field(
        default=None,
        description="base that the adapter names for PEFT; null: the source of the base",
    )
    hf_load: HfLoadConfig = HfLoadConfig()
    checkpoint_patch: CheckpointPatchConfig = CheckpointPatchConfig()
    load_hf_weights: Literal[False] = False
    trust_remote_code: Literal[False] = Field(
        default=False, description="code from a repository is never run"
    )

    @model_validator(mode="after")
    def _one_truth(self) -> Self:
        for name, values in self._spellings().items():
            given = {key: value for key, value in values.items() if value is not None}
            if len(set(given.values())) > 1:
                stated = ", ".join(f"{key}={value}" for key, value in given.items())
                raise ValueError(f"{name} is set to different values: {stated}")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        scheduler, lr = self.scheduler, self.optimizer.lr
        style, wsd_decay_iters = scheduler.lr_decay_style, scheduler.lr_wsd_decay_iters
        for key, value in (
            ("optimizer.min_lr", self.optimizer.min_lr),
            ("scheduler.lr_warmup_init", scheduler.lr_warmup_init),
        ):
            if value > lr:
                raise ValueError(f"{key}={value} is more than optimizer.lr={lr}")
        if style == "WSD" and not 0 < (wsd_decay_iters or 0) <= self.lr_decay_iters:
            raise ValueError(
                f"lr_decay_style=WSD needs scheduler.lr_wsd_decay_iters, the iterations of its "
                f"decay, between 1 and {self.lr_decay_iters}; it is {wsd_decay_iters}"
            )
        if style == "inverse-square-root" and self.lr_warmup_iters < 1:
            raise ValueError(
                "lr_decay_style=inverse-square-root is lr x sqrt(warm-up / iteration): it needs a "
                f"warm-up of 1 iteration or more; lr_warmup_iters is {self.lr_warmup_iters}"
            )
        return self

    @property
    def seq_length(self) -> int:
        """Longest packed row, tokens of the forward pass; the pack_size of the data."""
        return self._stated("seq_length", 4096)

    @property
    def tensor_model_parallel_size(self) -> int:
        """T: ranks that share every linear."""
        return self._stated("tensor_model_parallel_size", 1)

    @property
    def pipeline_model_parallel_size(self) -> int:
        """Stages that the layers are split over."""
        return self._stated("pipeline_model_parallel_size", 1)

    @property
    def context_parallel_size(self) -> int:
        """Ranks that share a sequence in attention."""
        return self._stated("context_parallel_size", 1)

    @property
    def expert_model_parallel_size(self) -> int:
        """Ranks that share the experts."""
        return self._stated("expert_model_parallel_size", 1)

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between the linears are split over the sequence, if TP is above 1."""
        return self._stated("sequence_parallel", True)

    @property
    def recompute_granularity(self) -> str | None:
        """What the backward pass computes again: "full" for whole layers, None for nothing."""
        return self._stated("recompute_granularity", None)

    @property
    def lr_decay_iters(self) -> int:
        """Iteration at which the learning rate stops falling."""
        return self.scheduler.lr_decay_iters or self.train.train_iters

    @property
    def lr_warmup_iters(self) -> float:
        """Iterations of the warm-up; one that outlasts the decay ends a row before it.

        Source: Megatron-Bridge, which counts a schedule in rows.
        """
        fraction = self.scheduler.lr_warmup_fraction
        stated = self.scheduler.lr_warmup_iters
        warmup_iters = stated if fraction is None else fraction * self.lr_decay_iters
        if warmup_iters < self.lr_decay_iters:
            return warmup_iters
        return self.lr_decay_iters - 1 / self.train.global_batch_size

    @property
    def packed_data(self) -> str | None:
        """Path of the packed data, from whichever key has it."""
        specs = self.dataset.packed_sequence_specs
        return self.dataset.nano3_packed_sft_dir or specs.packed_train_data_path

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job: TP x PP x DP."""
        shards = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return shards * self.recipe.data_parallel_size

    def _stated(self, name: str, default: Any) -> Any:
        values = self._spellings()[name].values()
        return next((value for value in values if value is not None), default)

    def _spellings(self) -> dict[str, dict[str, Any]]:
        sections = {"recipe": self.recipe, "model": self.model, "dataset": self.dataset}
        names = (
            "seq_length",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "sequence_parallel",
            "recompute_granularity",
        )
        spellings = {
            name: {
                f"{section}.{name}": getattr(values, name)
                for section, values in sections.items()
                if hasattr(values, name)
            }
            for name in names
        }
        packed_size = self.dataset.packed_sequence_specs.packed_sequence_size
        key = "dataset.packed_sequence_specs.packed_sequence_size"
        spellings["seq_length"][key] = packed_size
        return spellings
