"""Ways in which PEFT says which modules are adapted, by what is special about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

PLAIN: dict[str, dict[str, Any]] = {
    "pattern": {"target_modules": r".*\.layers\.1\..*(q_proj|down_proj)"},
    "all_linear": {"target_modules": "all-linear"},
    "one_layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "layers_by_name": {
        "target_modules": ["o_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["blocks", "layers"],
    },
    "layers_in_vain": {"target_modules": ["q_proj"], "layers_pattern": []},
    "excluded_names": {
        "target_modules": ["q_proj", "down_proj"],
        "exclude_modules": ["0.self_attn.q_proj", "down_proj"],
    },
    "excluded_by_pattern": {
        "target_modules": r".*_proj",
        "exclude_modules": r".*\.(mlp\..*|k_proj)",
    },
    "named_in_vain": {"target_modules": ["v_proj", "out_proj", "lm"]},
    "of_two_ranks": {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.0\..*": 5},
        "use_rslora": True,
    },
}


def save_plain_lora(base: Path, directory: Path, **fields: Any) -> PeftModel:
    """Save with PEFT what a training of ``base`` may leave, and return the adapted model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, **fields)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(directory))
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), directory)
