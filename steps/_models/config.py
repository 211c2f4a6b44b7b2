"""The shape of a decoder, read from a Hugging Face config or from Megatron-Bridge's run config.

Only what the model code honours is accepted. A config that asks for anything else (another
architecture, a bias, an unknown rope scaling) is refused here, before a weight is read, because a
model that ignores a field gives plausible and wrong logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron.errors import ExitCode, NemotronError

_ROPE_SCALING_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# Megatron hard-codes these for Llama 3 scaling and stores only the factor.
_MEGATRON_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What the model code takes for granted; a config that says otherwise is refused.
_HF_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_MEGATRON_REQUIRED: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "num_moe_experts": None,
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a Llama decoder, in Megatron's names.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of the gated MLP, per half (gate or up).
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads; divides ``num_attention_heads``.
        kv_channels: Width of one head.
        vocab_size: Rows of the embedding, without padding.
        layernorm_epsilon: Epsilon of RMSNorm.
        rotary_base: Theta of the rotary embedding.
        rope_scaling: None, or the Llama 3 scaling: ``rope_type`` "llama3", ``factor``,
            ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings``.
        share_embeddings_and_output_weights: Whether the output layer is the embedding (tied).
        max_position_embeddings: Longest sequence the model was made for, tokens.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: dict[str, Any] | None
    share_embeddings_and_output_weights: bool
    max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise _unsupported(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Return the sizes that a ``config.json`` states, in transformers 4 or 5 spelling.

        Raises:
            NemotronError: ``model_unsupported``: another architecture than Llama, a field that the
                model code does not honour, or a missing field.
        """
        _refuse_other_architecture(config)
        _refuse_other_values(config, _HF_REQUIRED)
        rope = config.get("rope_parameters") or {}
        num_heads = _required(config, "num_attention_heads")
        hidden_size = _required(config, "hidden_size")
        return cls(
            num_layers=_required(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=_required(config, "intermediate_size"),
            num_attention_heads=num_heads,
            num_query_groups=config.get("num_key_value_heads") or num_heads,
            kv_channels=config.get("head_dim") or hidden_size // num_heads,
            vocab_size=_required(config, "vocab_size"),
            layernorm_epsilon=float(_required(config, "rms_norm_eps")),
            rotary_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_hf_rope_scaling(rope or config.get("rope_scaling") or {}),
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=_required(config, "max_position_embeddings"),
        )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> DecoderConfig:
        """Return the sizes that the ``model`` section of a ``run_config.yaml`` states.

        Builder configs of newer Megatron-Bridge nest the fields under ``model.transformer``; both
        levels are read.

        Raises:
            NemotronError: ``model_unsupported``, as in ``from_hf``.
        """
        section = run_config.get("model") or {}
        model = {**section, **(section.get("transformer") or {})}
        _refuse_other_values(model, _MEGATRON_REQUIRED)
        _refuse_other_activation(model)
        num_heads = _required(model, "num_attention_heads")
        hidden_size = _required(model, "hidden_size")
        return cls(
            num_layers=_required(model, "num_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=_required(model, "ffn_hidden_size"),
            num_attention_heads=num_heads,
            num_query_groups=model.get("num_query_groups") or num_heads,
            kv_channels=model.get("kv_channels") or hidden_size // num_heads,
            vocab_size=_required(model, "vocab_size"),
            layernorm_epsilon=float(_required(model, "layernorm_epsilon")),
            rotary_base=float(_required(model, "rotary_base")),
            rope_scaling=_megatron_rope_scaling(model),
            share_embeddings_and_output_weights=bool(
                _required(model, "share_embeddings_and_output_weights")
            ),
            max_position_embeddings=_required(model, "seq_length"),
        )


def _refuse_other_architecture(config: Mapping[str, Any]) -> None:
    names = config.get("architectures") or []
    is_llama = config.get("model_type") == "llama" and names in ([], ["LlamaForCausalLM"])
    if not is_llama:
        raise _unsupported(
            f"the model is {names[0] if names else config.get('model_type')!r}; "
            "only LlamaForCausalLM is supported",
        )


def _refuse_other_values(config: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    for key, wanted in required.items():
        if config.get(key, wanted) not in (wanted, None):
            raise _unsupported(f"{key} is {config[key]!r}; only {wanted!r} is supported")


def _refuse_other_activation(model: Mapping[str, Any]) -> None:
    activation = model.get("activation_func") or "silu"
    name = activation.get("_target_", "") if isinstance(activation, Mapping) else str(activation)
    if name.rsplit(".", 1)[-1] != "silu":
        raise _unsupported(f"activation_func is {name!r}; only silu is supported")


def _hf_rope_scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("partial_rotary_factor is not 1; only full rotary is supported")
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise _unsupported(f"the rope type is {rope_type!r}; only default and llama3 are supported")
    return {"rope_type": "llama3"} | {key: _required(rope, key) for key in _ROPE_SCALING_KEYS}


def _megatron_rope_scaling(model: Mapping[str, Any]) -> dict[str, Any] | None:
    if not model.get("rope_scaling"):
        return None
    factor = float(_required(model, "rope_scaling_factor"))
    return {"rope_type": "llama3", "factor": factor, **_MEGATRON_LLAMA3}


def _required(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise _unsupported(f"the model's config has no {key}")
    return value


def _unsupported(problem: str) -> NemotronError:
    return NemotronError(
        "model_unsupported",
        problem,
        why="a field that the model code does not honour would give wrong logits silently",
        fix="use a model of the Llama family (model_type llama) whose config has none of these",
        exit_code=ExitCode.DATA,
    )
