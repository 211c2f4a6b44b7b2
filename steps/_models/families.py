"""Model families as Hugging Face describes them: reads and writes the sizes in ``config.json``.

The four families are one decoder with switches: Llama 2 and 3, Mistral (its own head size, a
sliding window), Qwen2 and 2.5 (a bias on q, k and v), Qwen3 (RMS norms on every query and key
head). Both spellings are read: that of transformers 4 (``rope_theta``, ``rope_scaling``) and that
of 5 (``rope_parameters``). An absent field has the default of the family's class in transformers.

Source: transformers, configuration_{llama,mistral,qwen2,qwen3}.py, 4.57 and 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron.steps._models.fields import number, refuse_other_values, unsupported, whole

ROPE_SCALING_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# What the model code assumes; a config that says something else is refused.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_mrope": False,
}


@dataclass(frozen=True)
class Family:
    """What one ``model_type`` has that its ``config.json`` does not say."""

    architecture: str
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    head_dim: int | None = None
    """Where the config states none; None: hidden_size / num_attention_heads."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", add_qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_layernorm=True, head_dim=128),
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def sizes_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``DecoderConfig`` that a ``config.json`` states.

    Raises:
        NemotronError: ``model_unsupported``: another architecture, a field that the model code does
            not honour, or a missing field.
    """
    family = _family(config)
    refuse_other_values(config, _REQUIRED)
    _refuse_two_rotations(config)
    num_heads = whole(config, "num_attention_heads")
    hidden_size = whole(config, "hidden_size")
    head_dim = family.head_dim or hidden_size // num_heads
    return {
        "num_layers": whole(config, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": whole(config, "intermediate_size"),
        "num_attention_heads": num_heads,
        "num_query_groups": _num_query_groups(config, num_heads),
        "kv_channels": whole(config, "head_dim", default=head_dim),
        "vocab_size": whole(config, "vocab_size"),
        "layernorm_epsilon": number(config, "rms_norm_eps"),
        "rotary_base": number({"rope_theta": _rotary_base(config)}, "rope_theta"),
        "rope_scaling": _rope_scaling(_rope(config)),
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
        "max_position_embeddings": whole(config, "max_position_embeddings"),
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "window_size": _window_size(config),
    }


def hf_from_sizes(sizes: Mapping[str, Any], *, dtype_name: str) -> dict[str, Any]:
    """Return a ``config.json`` for a model that never had one; the inverse of ``sizes_from_hf``.

    It is in the spelling of transformers 4, which transformers 5 also reads.

    Args:
        sizes: Fields of ``DecoderConfig``.
        dtype_name: Such as ``bfloat16``.

    Raises:
        NemotronError: ``model_unsupported``: no family has this combination.
    """
    model_type = _model_type(sizes)
    window = sizes["window_size"]
    config = {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        "num_hidden_layers": sizes["num_layers"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_query_groups"],
        "head_dim": sizes["kv_channels"],
        "vocab_size": sizes["vocab_size"],
        "rms_norm_eps": sizes["layernorm_epsilon"],
        "rope_theta": sizes["rotary_base"],
        "rope_scaling": sizes["rope_scaling"],
        "tie_word_embeddings": sizes["share_embeddings_and_output_weights"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "hidden_act": "silu",
        "torch_dtype": dtype_name,
    }
    if model_type == "mistral":
        config["sliding_window"] = window
    elif window is not None:
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return config


def in_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` that transformers 4 and 5 read as the same model.

    transformers 4 ignores ``rope_parameters``, and a ``rope_theta`` inside ``rope_scaling``, and
    would compute with a base of 10000.
    """
    rope = _rope(config)
    if not config.get("rope_parameters") and "rope_theta" not in rope:
        return dict(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = (rope.get("rope_type") or rope.get("type") or "default") != "default"
    dtype = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    return {
        **config,
        "rope_theta": _rotary_base(config),
        "rope_scaling": scaling if is_scaled else None,
        **dtype,
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of the rotary embedding that transformers 5 uses."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rotary_base(config: Mapping[str, Any]) -> float:
    return _rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0


def _model_type(sizes: Mapping[str, Any]) -> str:
    has_bias, has_norms = sizes["add_qkv_bias"], sizes["qk_layernorm"]
    if has_bias and has_norms:
        raise unsupported("add_qkv_bias and qk_layernorm are both set; no family has both")
    if has_bias or has_norms:
        return "qwen3" if has_norms else "qwen2"
    return "llama" if sizes["window_size"] is None else "mistral"


def _family(config: Mapping[str, Any]) -> Family:
    names = config.get("architectures") or []
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or names not in ([], [family.architecture]):
        supported = ", ".join(each.architecture for each in FAMILIES.values())
        raise unsupported(
            f"the model is {names[0] if names else config.get('model_type')!r}; "
            f"supported are {supported}",
        )
    return family


def _num_query_groups(config: Mapping[str, Any], num_heads: int) -> int:
    if config["model_type"] == "llama":  # Llama 1 and 2 have no such field
        return whole(config, "num_key_value_heads", default=num_heads)
    return whole(config, "num_key_value_heads")


def _window_size(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a token sees, itself included; None: all before it."""
    default = None if config["model_type"] == "llama" else 4096
    window = config.get("sliding_window", default)
    if config["model_type"] == "mistral":
        has_window = {window is not None}
    elif config["model_type"] == "llama" or not config.get("use_sliding_window"):
        has_window, window = {False}, None
    else:
        num_full = config.get("max_window_layers", 28)
        layers = range(whole(config, "num_hidden_layers"))
        default_types = [_SLIDING if layer >= num_full else _FULL for layer in layers]
        has_window = {kind == _SLIDING for kind in config.get("layer_types") or default_types}
    if len(has_window) > 1:
        raise unsupported("some layers have a sliding window and some do not")
    return window if has_window == {True} else None


def _refuse_two_rotations(config: Mapping[str, Any]) -> None:
    """Refuse a config whose two spellings contradict each other.

    If it states two bases, transformers 4 uses the outer one and transformers 5 the inner one.
    """
    ropes = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    bases = {each.get("rope_theta") for each in (config, *ropes)} - {None, _rotary_base(config)}
    scalings = [_rope_scaling(each) for each in ropes]
    if bases or any(each != scalings[0] for each in scalings):
        raise unsupported(
            "config.json describes two rotary embeddings: rope_parameters are "
            f"{config.get('rope_parameters')}, rope_theta is {config.get('rope_theta')}, "
            f"rope_scaling is {config.get('rope_scaling')}"
        )


def _rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported("partial_rotary_factor is not 1; only full rotary is supported")
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise unsupported(f"the rope type is {rope_type!r}; only default and llama3 are supported")
    for key in ROPE_SCALING_KEYS:
        number(rope, key)
        if isinstance(rope[key], str):  # what another reader of it would not take
            raise unsupported(f"{key} in the rope scaling is {rope[key]!r}; wanted a number")
    return {"rope_type": "llama3"} | {key: rope[key] for key in ROPE_SCALING_KEYS}
