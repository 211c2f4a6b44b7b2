"""Small random models of every family, made by transformers, in both spellings of a config.

By transformers 5, or by 4.57.6 where that comes first on the path:

    pip install --target PEERS transformers==4.57.6
    PYTHONPATH=PEERS:src python -m pytest tests/peers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA31_ROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 12, "sliding_window": 4}),
    "qwen2.5": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": ROPE, "rms_norm_eps": 1e-6}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "rope_parameters": ROPE}),
}


def make_model(family: str, *, tied: bool = False, **changes: Any) -> PreTrainedModel:
    """Return a model of a family; biases and norms are random too, as training leaves them."""
    torch.manual_seed(0)
    model_class, config_class, own = MODELS[family]
    values = {**SIZES, **own, "tie_word_embeddings": tied, **changes}
    config = config_class(**spelt_as_installed(values))
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def spell_as_transformers_4(directory: Path) -> None:
    """Rewrite a ``config.json`` as transformers 4 writes it."""
    path = directory / "config.json"
    config = spelt_as_by_transformers_4(json.loads(path.read_text(encoding="utf-8")))
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.6"
    path.write_text(json.dumps(config), encoding="utf-8")


def spelt_as_installed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config of transformers 5 for the transformers that is here."""
    is_old = transformers.__version__.startswith("4.")
    return spelt_as_by_transformers_4(values) if is_old else values


def spelt_as_by_transformers_4(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config with ``rope_theta`` and ``rope_scaling``."""
    if "rope_parameters" not in values:
        return values
    rope = dict(values["rope_parameters"])
    others = {key: value for key, value in values.items() if key != "rope_parameters"}
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    return {**others, "rope_theta": theta, "rope_scaling": scaling}
