# pyright: reportMissingImports=false
"""Megatron-Bridge on a CPU: its own loaders for bases and adapters, with Megatron-Core's layers.

Everything that reads a checkpoint is the peer's: the trackers, ``run_config.yaml``, the common
state, the tensors, strictly. Replaced is what needs a GPU to be imported or called.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typing_extensions
from torch import Tensor

from tests.peers.absent_modules import install_absent_modules

if not hasattr(typing, "override"):  # of Python 3.12, for Megatron-Bridge of 2026-08
    setattr(typing, "override", typing_extensions.override)  # noqa: B010
# Before the modules that are absent seem to be there, so that Megatron-Core does without them.
import megatron.core.extensions
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.transformer.transformer_block

install_absent_modules()
import megatron.bridge  # noqa: E402
import megatron.bridge.peft.utils  # noqa: E402
from megatron.bridge.models.gpt_provider import local_layer_spec  # noqa: E402
from megatron.bridge.peft.canonical_lora import CanonicalLoRA  # noqa: E402
from megatron.bridge.training import (  # noqa: E402
    checkpointing,
    config,
    model_load_save,
    setup,
)
from megatron.bridge.training.state import GlobalState  # noqa: E402
from megatron.bridge.utils.instantiate_utils import instantiate  # noqa: E402
from megatron.core import num_microbatches_calculator, parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402

VERSIONS = (
    f"megatron-bridge {megatron.bridge.__version__}, megatron-core {megatron.core.__version__}"
)
_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def initialize() -> int:
    """Start one rank of a process group under torchrun; return the tensor-parallel size."""
    _do_without_gpu()
    torch.distributed.init_process_group("gloo")
    tp_size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    num_microbatches_calculator.init_num_microbatches_calculator(0, None, 1, 1, 1)
    return tp_size


def load_base(root: Path) -> torch.nn.Module:
    """Return the model at a checkpoint root, by what ``load_megatron_model`` consists of."""
    iteration_dir = next(root.glob("iter_*"))
    provider = _provider(iteration_dir)
    loaded = model_load_save.build_and_load_model(str(iteration_dir), provider, use_cpu_init=True)
    return _unwrapped(loaded)


def load_adapted(base: Path, adapter: Path) -> torch.nn.Module:
    """Return base and adapter as a training with ``checkpoint.load`` starts with them.

    The base is loaded through its trackers by the hook that training registers, the adapter's
    modules are made from its ``run_config.yaml``, and the adapter is loaded as a resume.
    """
    iteration_dir = next(adapter.glob("iter_*"))
    run_config = checkpointing.read_run_config(str(iteration_dir / "run_config.yaml"))
    state = _training(base, adapter=instantiate(run_config["peft"]), load=str(adapter))
    models = _start(state)
    state.cfg.checkpoint.finetune = False
    checkpointing.load_checkpoint(state, models, None, None)
    return _unwrapped(models)


@torch.no_grad()
def save_adapted(base: Path, adapter: Path, *, dim: int, alpha: int) -> torch.nn.Module:
    """Return a base with a random ``CanonicalLoRA``, saved to ``adapter`` as training saves it."""
    kind = CanonicalLoRA(dim=dim, alpha=alpha)
    state = _training(base, adapter=kind, save=str(adapter), save_optim=False, save_rng=False)
    models = _start(state)
    shared = torch.Generator().manual_seed(5)
    own = torch.Generator().manual_seed(6 + torch.distributed.get_rank())
    for name, parameter in _unwrapped(models).named_parameters():
        if ".adapter" in name:
            generator = own if getattr(parameter, "tensor_model_parallel", False) else shared
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    checkpointing.save_checkpoint(state, models, None, None, 0)
    return _unwrapped(models)


def _training(base: Path, *, adapter: Any, **checkpoint: Any) -> GlobalState:
    """Return the state of a training that starts from a base, as far as its checkpoints need it."""
    state = GlobalState()
    state.cfg = config.ConfigContainer(
        model=_provider(next(base.glob("iter_*"))),
        peft=adapter,
        train=config.TrainingConfig(global_batch_size=1, micro_batch_size=1, train_iters=1),
        optimizer=config.OptimizerConfig(),
        scheduler=config.SchedulerConfig(),
        dataset=None,
        logger=config.LoggerConfig(),
        tokenizer=config.TokenizerConfig(),
        rng=config.RNGConfig(),
        checkpoint=config.CheckpointConfig(
            pretrained_checkpoint=str(base), load_optim=False, load_rng=False, **checkpoint
        ),
    )
    return state


def _start(state: GlobalState) -> list[Any]:
    """Return the model with its base loaded and its adapter added."""
    provider = state.cfg.model
    provider.finalize()
    provider.register_pre_wrap_hook(setup._create_peft_pre_wrap_hook(state.cfg, state))
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


@torch.no_grad()
def logits(model: torch.nn.Module, ids_BS: Tensor) -> Tensor:
    """Return a model's logits of token ids, [B, S, V], whole on every rank."""
    length = ids_BS.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    shard_BSV = model.eval()(ids_BS, torch.arange(length)[None].expand_as(ids_BS), mask)
    shards = [torch.empty_like(shard_BSV) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shards, shard_BSV.contiguous())
    return torch.cat(shards, dim=-1)


def _provider(iteration_dir: Path) -> Any:
    """Return the model that a ``run_config.yaml`` describes, with layers that run on a CPU."""
    provider, _ = model_load_save.load_model_config(str(iteration_dir))
    provider.tensor_model_parallel_size = torch.distributed.get_world_size()
    provider.transformer_layer_spec = local_layer_spec
    provider.perform_initialization = False
    provider.use_cpu_initialization = True
    for name in _FUSIONS:
        setattr(provider, name, False)
    return provider


def _unwrapped(models: list[Any]) -> torch.nn.Module:
    model = models[0]
    while hasattr(model, "module"):
        model = model.module
    return model


def _do_without_gpu() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state = lambda device=None: torch.empty(0)
    checkpointing.save_sharded_modelopt_state = lambda *_: None
    # Megatron-Core makes the mask of a sliding window on "cuda".
    torch.ones = partial(_ones_here, torch.ones)
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    megatron.bridge.peft.utils.HAVE_TE = False
    checkpointing.restore_modelopt_state = lambda *_: None
    # It would go on without a tensor that is missing, saying so only in the log.
    checkpointing._load_model_state_dict = _load_strictly


def _ones_here(
    ones: Callable[..., Tensor], *sizes: Any, device: object = None, **rest: Any
) -> Tensor:
    return ones(*sizes, **rest)


def _load_strictly(module: torch.nn.Module, state_dict: dict[str, Any], strict: bool) -> None:
    module.load_state_dict(state_dict, strict=strict)
