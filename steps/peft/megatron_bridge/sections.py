"""The sections of the config of peft/megatron_bridge, in upstream's keys.

Keys of upstream whose other values ask for behaviour that does not exist here accept only the
values that are honoured. What follows from several sections is in ``schema``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nemotron.config import Schema
from nemotron.steps._models.targets import LINEARS

# Names of linears, or what is set for each.
Patterns = TypeVar("Patterns", tuple[str, ...], dict[str, PositiveInt], dict[str, PositiveFloat])

# Upstream selects defaults by importing these; here they are names, and nothing is imported.
Recipe = Literal[
    "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_peft_config",
    "megatron.bridge.recipes.nemotronh.nemotron_3_nano.nemotron_3_nano_finetune_config",
]


class RecipeConfig(Schema):
    """Layout and sequence length; the first place to override them."""

    model_config = ConfigDict(populate_by_name=True)

    target: Recipe | None = Field(
        default=None,
        alias="_target_",
        description="upstream's name for these defaults; nothing is imported",
    )
    packed_sequence: Literal[True] = Field(default=True, description="rows are always packed")
    peft: Literal["lora"] = Field(default="lora", description="the recipe is always LoRA")
    seq_length: PositiveInt | None = None
    tensor_model_parallel_size: PositiveInt | None = None
    pipeline_model_parallel_size: PositiveInt | None = None
    context_parallel_size: PositiveInt | None = Field(
        default=None, description="ranks that share a sequence in attention; only 1 is supported"
    )
    expert_model_parallel_size: PositiveInt | None = Field(
        default=None, description="ranks that share the experts; only 1 is supported"
    )
    sequence_parallel: bool | None = Field(
        default=None,
        description=(
            "split activations between the linears over the sequence; null: true if "
            "tensor_model_parallel_size is above 1"
        ),
    )
    data_parallel_size: PositiveInt = 1
    recompute_granularity: Literal["full"] | None = Field(
        default=None,
        description="full: keep only each layer's input, recompute the rest in the backward pass",
    )


class ModelConfig(Schema):
    """The same facts in Megatron's model section, and how the loss is normalised."""

    seq_length: PositiveInt | None = Field(default=None, description="same as recipe.seq_length")
    tensor_model_parallel_size: PositiveInt | None = Field(
        default=None, description="same as recipe.tensor_model_parallel_size"
    )
    pipeline_model_parallel_size: PositiveInt | None = Field(
        default=None, description="same as recipe.pipeline_model_parallel_size"
    )
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(
        default=None,
        description="parts of the model on each pipeline stage; above 1: interleaved schedule",
    )
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        default=None, description="layers of the first stage; null: as even as possible"
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        default=None, description="layers of the last stage; null: as even as possible"
    )
    context_parallel_size: PositiveInt | None = Field(
        default=None, description="same as recipe.context_parallel_size"
    )
    expert_model_parallel_size: PositiveInt | None = Field(
        default=None, description="same as recipe.expert_model_parallel_size"
    )
    expert_tensor_parallel_size: PositiveInt | None = Field(
        default=None, description="ranks that share an expert; only 1 is supported"
    )
    sequence_parallel: bool | None = Field(
        default=None, description="same as recipe.sequence_parallel"
    )
    calculate_per_token_loss: bool = Field(
        default=True,
        description="mean over the global batch's supervised tokens; false: over its micro batches",
    )
    recompute_granularity: Literal["full"] | None = Field(
        default=None, description="same as recipe.recompute_granularity"
    )
    recompute_method: Literal["uniform"] | None = Field(
        default=None, description="uniform: the same for every layer; needs recompute_granularity"
    )
    recompute_num_layers: Literal[1] | None = Field(
        default=None, description="layers recomputed together; needs recompute_granularity"
    )


class PackedSequenceSpecs(Schema):
    """Upstream's other spelling of where the packs are: a directory or a glob of Parquet files."""

    packed_sequence_size: PositiveInt | None = Field(
        default=None, description="same as recipe.seq_length"
    )
    packed_train_data_path: str | None = None
    packed_val_data_path: str | None = Field(
        default=None, description="the valid shards; must belong to the same packed data"
    )


class DatasetConfig(Schema):
    """The packed data."""

    nano3_packed_sft_dir: str | None = None
    seq_length: PositiveInt | None = Field(default=None, description="same as recipe.seq_length")
    dataloader_type: Literal["batch"] = Field(
        default="batch",
        description="global batches of rows, reshuffled every epoch",
    )
    packed_sequence_specs: PackedSequenceSpecs = PackedSequenceSpecs()


class TrainConfig(Schema):
    """Length of the run and batch sizes, in packed rows."""

    train_iters: PositiveInt = 1000
    global_batch_size: PositiveInt = 4
    micro_batch_size: PositiveInt = 1
    eval_interval: PositiveInt = Field(
        default=500, description="optimizer steps between evaluations; every save is evaluated too"
    )
    eval_iters: PositiveInt = Field(
        default=32, description="largest number of global batches per evaluation"
    )


class PeftConfig(Schema):
    """The adapter. ``alpha / dim`` scales it; dropout acts on its input.

    A pattern is a linear's own name, or a wildcard on its full name.
    """

    type: Literal["lora"] = "lora"
    dim: PositiveInt = 32
    alpha: float = Field(default=32.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj")
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(dim) instead")
    rank_pattern: dict[str, PositiveInt] = Field(
        default={}, description="dim of the linears that match a pattern; the first match is used"
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default={}, description="alpha of the linears that match a pattern; the first match is used"
    )
    lora_plus_lr_ratio: PositiveFloat = Field(
        default=1.0, description="ratio of the learning rate of lora_b to that of lora_a (LoRA+)"
    )

    @field_validator("target_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _targets_exist(cls, patterns: Patterns, info: ValidationInfo) -> Patterns:
        # Whether full names and wildcards match depends on the base; see checks.target_errors.
        unknown = [each for each in patterns if "." not in each and "*" not in each]
        unknown = sorted(set(unknown) - set(LINEARS))
        if unknown or (info.field_name == "target_modules" and not patterns):
            raise ValueError(
                f"{unknown} must be some of {list(LINEARS)}, or wildcards "
                "such as *.layers.0.*.linear_qkv"
            )
        return patterns


class OptimizerConfig(Schema):
    """AdamW on fp32 masters of the adapter."""

    lr: float = Field(default=1e-4, gt=0.0, description="learning rate after the warm-up")
    min_lr: NonNegativeFloat = Field(
        default=0.0, description="learning rate at the end of the decay"
    )
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    adam_beta2: float = Field(
        default=0.95, ge=0.0, lt=1.0, description="decay of the second moment"
    )
    adam_eps: float = Field(
        default=1e-8, gt=0.0, description="added to the root of the second moment"
    )
    weight_decay: NonNegativeFloat = Field(default=0.1, description="decoupled weight decay")
    clip_grad: NonNegativeFloat = Field(
        default=1.0, description="maximum global gradient norm; 0: no clipping"
    )


class SchedulerConfig(Schema):
    """Learning rate over iterations: linear warm-up, then the decay style down to ``min_lr``."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = Field(
        default="cosine",
        description="shape of the decay after the warm-up; WSD: stable first, decay at the end",
    )
    lr_warmup_iters: NonNegativeInt = Field(
        default=50,
        description="iterations of the warm-up, kept below lr_decay_iters; the first has rate 0",
    )
    lr_decay_iters: PositiveInt | None = Field(
        default=None, description="iteration at which the decay ends; null: train.train_iters"
    )
    lr_warmup_fraction: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="the warm-up as a fraction of lr_decay_iters, instead of lr_warmup_iters",
    )
    lr_warmup_init: NonNegativeFloat = Field(
        default=0.0, description="learning rate of the first iteration of the warm-up"
    )
    lr_wsd_decay_iters: PositiveInt | None = Field(
        default=None, description="iterations of the WSD decay, at the end of lr_decay_iters"
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential", description="shape of the WSD decay"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        is_given = "lr_warmup_iters" in self.model_fields_set and self.lr_warmup_iters > 0
        if self.lr_warmup_fraction is not None and is_given:
            raise ValueError(
                f"lr_warmup_fraction={self.lr_warmup_fraction} and "
                f"lr_warmup_iters={self.lr_warmup_iters} both state the warm-up; "
                "set lr_warmup_iters=0"
            )
        return self


class CheckpointConfig(Schema):
    """Where the base is and where adapters go."""

    save: Path = Field(
        default=Path("./output/peft/megatron_bridge/default"),
        description="directory of the adapters and of metrics.jsonl",
    )
    pretrained_checkpoint: str | None = None
    load: str | None = Field(
        default=None,
        description="directory of another run whose saves to resume from; an unfinished run in "
        "save is resumed without it",
    )
    ckpt_step: PositiveInt | None = Field(
        default=None, description="iteration of load to resume from; null: its newest intact save"
    )
    save_interval: PositiveInt = Field(
        default=50, description="optimizer steps between saves; the last step is always saved"
    )
    most_recent_k: int = Field(
        default=-1,
        description="newest saves to keep, 2 or more: older ones, except the one with the lowest "
        "validation loss, are deleted once a newer one is intact; -1: keep all",
    )
    finetune: Literal[True] = Field(
        default=True,
        description="only the weights of pretrained_checkpoint are used",
    )
    fully_parallel_save: Literal[False] = Field(
        default=False, description="an adapter is small: one rank writes it"
    )
    async_save: Literal[False] = Field(
        default=False, description="an adapter is small: a save takes milliseconds"
    )
    save_optim: bool = Field(
        default=True,
        description="save what a run needs to resume; false: adapter only, a stopped run restarts",
    )
    save_rng: Literal[False] = Field(
        default=False,
        description="nothing to save: all randomness is derived from seed, iteration and row",
    )

    @model_validator(mode="after")
    def _can_be_honoured(self) -> Self:
        if self.most_recent_k != -1 and self.most_recent_k < 2:
            raise ValueError(
                f"most_recent_k is {self.most_recent_k}; wanted -1, or 2 or more, so that a "
                "damaged save is never the only one"
            )
        if self.ckpt_step is not None and self.other_run is None:
            raise ValueError(
                "ckpt_step selects a save of checkpoint.load, which must be a different directory "
                "from checkpoint.save, so that later saves are not overwritten"
            )
        return self

    @property
    def other_run(self) -> Path | None:
        """Directory of another run to continue; None without one.

        Upstream has to set ``load`` to ``save`` to continue its own run; that happens here anyway.
        """
        if self.load is None or Path(self.load).resolve() == self.save.resolve():
            return None
        return Path(self.load)


class HfLoadConfig(Schema):
    """Upstream's handling of its own checkpoint keys; nothing here clears or inherits them."""

    clear_pretrained_checkpoint: Literal[False] = Field(default=False, description="not done")
    inherit_save_as_load: Literal[False] = Field(default=False, description="not done")


class CheckpointPatchConfig(Schema):
    """How upstream starts its checkpoint writer; ours has no queue, so the value has no effect."""

    use_spawn_queue_for_torch_dist: bool = Field(
        default=True, description="accepted without effect"
    )


class LoggerConfig(Schema):
    """Where metrics are shown beside ``metrics.jsonl``, which always has every iteration."""

    log_interval: PositiveInt = Field(
        default=10, description="optimizer steps between printed lines"
    )
    tensorboard_dir: str | None = Field(
        default=None, description="directory of TensorBoard's event files; null: none are written"
    )
    tensorboard_log_interval: PositiveInt = Field(
        default=1, description="optimizer steps between values sent to TensorBoard and W&B"
    )
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project; null: nothing is sent there"
    )
    wandb_exp_name: str | None = Field(
        default=None, description="name of the run there, with wandb_project"
    )
    wandb_entity: str | None = Field(
        default=None, description="owner of the project; null: the account's default"
    )
    wandb_save_dir: str | None = Field(
        default=None, description="where wandb keeps its files; null: as wandb decides (WANDB_DIR)"
    )


class RngConfig(Schema):
    """The one seed: of the adapter's initial values, of dropout and of the order of the rows."""

    seed: int = Field(
        default=1234,
        ge=0,
        lt=2**63,  # of torch's 64 bits one less, so that epochs may be added
        description="seed of the adapter, of dropout and of the order of the rows",
    )


class DistConfig(Schema):
    """The process groups."""

    distributed_timeout_minutes: PositiveInt = Field(
        default=10, description="longest wait for another rank"
    )
    heartbeat_timeout_seconds: PositiveInt = Field(
        default=60,
        description="how long a rank may neither compute nor wait for another before the job ends",
    )
