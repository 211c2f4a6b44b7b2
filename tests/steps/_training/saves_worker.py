"""Ranks of test_checkpoint.py: one adapter and its moments, saved at every layout of these ranks.

``saves_worker.py REPORT``: rank 0 leaves each layout's save beside the report, which has its path
and how many tensors each rank held to write it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.artifacts import Producer
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import all_gather
from nemotron.steps._tensor_parallel.linear import (
    ColumnParallelLinear,
    LoraSpec,
    RowParallelLinear,
    draw_lora_a,
)
from nemotron.steps._training.batches import PackedSplit
from nemotron.steps._training.checkpoint import Origin, save_adapter
from nemotron.steps._training.distributed import Layout, make_layout
from nemotron.steps._training.loop import AdamSettings, BatchSettings, Trainer
from nemotron.steps._training.metrics import MetricsLog
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.pipeline_schedule import split_layers
from nemotron.steps._training.schedule import Schedule

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
    }
)
LORA = LoraTargets(["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], LoraSpec(4, 8.0))
Linear = ColumnParallelLinear | RowParallelLinear


def main() -> None:
    report_path = Path(sys.argv[-1])
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    report = {}
    for tensor in (1, 2, 4):
        for pipeline in (1, 2, 4):
            if size % (tensor * pipeline) == 0:
                name = f"TP {tensor} PP {pipeline}"
                layout = make_layout(tensor, size // pipeline, torch.device("cpu"))
                report[name] = saved(report_path.parent / name, layout, pipeline)
    if dist.get_rank() == 0:
        report_path.write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def saved(directory: Path, layout: Layout, pipeline: int) -> dict[str, object]:
    trainer = trainer_of(layout, split_layers(CONFIG.num_layers, pipeline)[layout.pipeline.rank])
    moments = trainer.moments()
    held = all_gather(torch.tensor(len(moments)), layout.world).tolist()
    origin = Origin(
        base_model_name_or_path="random",
        tokenizer_dir=None,
        packed_root=directory,
        produced_by=Producer(step="test", config_sha256="0" * 64, code_version="0"),
        inputs=[],
        properties={},
    )
    written = save_adapter(
        directory,
        trainer.model,
        layout=layout,
        iteration=1,
        origin=origin,
        losses={},
        moments=moments,
        run_state={"iteration": 1},
    )
    return {"save": str(written), "held": held}


def trainer_of(layout: Layout, layers: range) -> Trainer:
    """Return a trainer whose adapter and moments are the same logical ones at every layout."""
    chunk = GPTModel(CONFIG, lora=LORA, group=layout.tensor, dtype=torch.float32, layers=layers)
    model = PipelineStage([chunk], group=layout.pipeline, device=layout.device)
    for linear in model.adapted_linears():
        linear.load_lora(*drawn(linear, "values"))
    trainer = Trainer(
        model,
        layout=layout,
        train_rows=cast(PackedSplit, None),  # not a step is taken
        valid_rows=None,
        batch=BatchSettings(4, 1, calculate_per_token_loss=True),
        schedule=Schedule(1e-3, 1e-4, 3, 10, "cosine"),
        adam=AdamSettings(0.9, 0.95, 1e-8, 0.1, 1.0),
        seed=1,
        metrics=cast(MetricsLog, None),
    )
    for kind, moment in trainer.optimizer.moments.items():
        views = trainer.adapter.views(moment)
        for linear in model.adapted_linears():
            shards = linear.shard_lora(*drawn(linear, kind))
            for each, shard in zip(linear.lora_parameters(), shards, strict=True):
                views[each.name].copy_(shard)
    return trainer


def drawn(linear: Linear, kind: str) -> tuple[Tensor, Tensor]:
    """Return random tensors that are shaped as a linear's whole factors."""
    (lora_dim, in_features), (out_features, _) = linear.lora_a.shape, linear.lora_b.shape
    if isinstance(linear, RowParallelLinear):
        in_features = linear.in_features
    else:
        out_features = linear.num_segments * linear.segment_features
    name = f"{kind}/{linear.name}"
    lora_a = draw_lora_a(1, f"{name}/a", lora_dim, in_features)
    return lora_a, draw_lora_a(1, f"{name}/b", out_features, lora_dim)


if __name__ == "__main__":
    main()
