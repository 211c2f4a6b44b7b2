"""The ``model`` section of Megatron-Bridge's ``run_config.yaml``, read into sizes and written.

Source: Megatron-Bridge 0.2 to 0.6 and of 2026-08, models/gpt_provider.py and models/llama;
Megatron-Core, models/common/embeddings/rotary_pos_embedding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron.steps._models.fields import number, refuse_other_values, required, unsupported, whole

# Megatron hard-codes these for Llama 3 scaling and stores only the factor.
MEGATRON_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_REQUIRED: dict[str, Any] = {
    # The kind of model comes first: an error names the first field, and these say most.
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "layernorm_zero_centered_gamma": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_attn_skip_freq": None,
}


def sizes_from_run_config(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``DecoderConfig`` that a ``run_config.yaml`` states.

    Builder configs of newer Megatron-Bridge nest the fields under ``model.transformer``; both
    levels are read.

    Raises:
        NemotronError: ``model_unsupported``: a field that the model code does not honour, or a
            missing field.
    """
    section = run_config.get("model") or {}
    model = {**section, **(section.get("transformer") or {})}
    refuse_other_values(model, _REQUIRED)
    _refuse_other_activation(model)
    num_heads = whole(model, "num_attention_heads")
    hidden_size = whole(model, "hidden_size")
    return {
        "num_layers": whole(model, "num_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": whole(model, "ffn_hidden_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": whole(model, "num_query_groups", default=num_heads),
        "kv_channels": whole(model, "kv_channels", default=hidden_size // num_heads),
        "vocab_size": whole(model, "vocab_size"),
        "layernorm_epsilon": number(model, "layernorm_epsilon"),
        "rotary_base": number(model, "rotary_base"),
        "rope_scaling": _rope_scaling(model),
        "share_embeddings_and_output_weights": bool(
            required(model, "share_embeddings_and_output_weights")
        ),
        "max_position_embeddings": whole(model, "seq_length"),
        "add_qkv_bias": bool(model.get("add_qkv_bias")),
        "qk_layernorm": bool(model.get("qk_layernorm")),
        "window_size": _window_size(model.get("window_size")),
    }


def model_section(sizes: Mapping[str, Any], *, dtype_name: str, source_name: str) -> dict[str, Any]:
    """Return the ``model`` section for a model; the inverse of ``sizes_from_run_config``.

    Of a Llama 3 rope scaling Megatron knows the factor only; ``hf/config.json`` has all of it.

    Args:
        sizes: Fields of ``DecoderConfig``.
        dtype_name: Type of the weights, such as ``bfloat16``.
        source_name: Where the model came from on the Hugging Face side.
    """
    scaling: Mapping[str, Any] = sizes["rope_scaling"] or {}
    window = sizes["window_size"]
    derived = ("rope_scaling", "window_size", "max_position_embeddings")
    return {
        **{key: value for key, value in sizes.items() if key not in derived},
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "bf16": dtype_name == "bfloat16",
        "fp16": dtype_name == "float16",
        "gated_linear_unit": True,
        "hf_model_id": source_name,
        "hidden_dropout": 0.0,
        "normalization": "RMSNorm",
        "params_dtype": {"_call_": False, "_target_": f"torch.{dtype_name}"},
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": "rope",
        "rope_scaling": bool(scaling),
        "rope_scaling_factor": float(scaling.get("factor", 1.0)),
        "rotary_percent": 1.0,
        "seq_length": sizes["max_position_embeddings"],
        "should_pad_vocab": False,
        "tensor_model_parallel_size": 1,
        # Megatron counts the tokens before and after; a window counts the token itself as well.
        "window_size": None if window is None else [window - 1, 0],
    }


def megatron_would_misread(rope_scaling: Mapping[str, Any] | None) -> bool:
    """Return whether Megatron would compute other angles than a model with this scaling."""
    scaling = rope_scaling or {}
    return any(scaling.get(key, value) != value for key, value in MEGATRON_LLAMA3.items())


def _refuse_other_activation(model: Mapping[str, Any]) -> None:
    activation = model.get("activation_func") or "silu"
    name = activation.get("_target_", "") if isinstance(activation, Mapping) else str(activation)
    if name.rsplit(".", 1)[-1] != "silu":
        raise unsupported(f"activation_func is {name!r}; only silu is supported")


def _window_size(window: Any) -> int | None:
    if window is None:
        return None
    is_pair = isinstance(window, list | tuple) and len(window) == 2
    if not is_pair or window[0] < 0 or window[1] != 0:
        raise unsupported(f"window_size is {window!r}; only [tokens before, 0] is supported")
    return window[0] + 1


def _rope_scaling(model: Mapping[str, Any]) -> dict[str, Any] | None:
    if model.get("old_context_len") is not None:  # Megatron-Bridge 0.2's Llama 3.1
        return {
            "rope_type": "llama3",
            "factor": number(model, "scale_factor"),
            "low_freq_factor": number(model, "low_freq_factor"),
            "high_freq_factor": number(model, "high_freq_factor"),
            "original_max_position_embeddings": whole(model, "old_context_len"),
        }
    if not model.get("rope_scaling"):
        return None
    factor = number(model, "rope_scaling_factor")
    return {"rope_type": "llama3", "factor": factor, **MEGATRON_LLAMA3}
