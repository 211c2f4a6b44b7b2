"""DecoderConfig against transformers' own configs and Megatron-Bridge's run configs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import LlamaConfig

from nemotron.errors import NemotronError
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.families import in_both_spellings
from nemotron.steps._models.run_config import megatron_would_misread

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HF_4: dict[str, Any] = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
HF_5: dict[str, Any] = {
    key: value
    for key, value in HF_4.items()
    if key not in ("rope_theta", "rope_scaling", "torch_dtype")
} | {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"}
MEGATRON: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 4,
    "vocab_size": 97,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500000.0,
    "share_embeddings_and_output_weights": True,
    "seq_length": 64,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
}


def test_from_hf_reads_every_size_of_a_transformers_config() -> None:
    hf = LlamaConfig(**SIZES, head_dim=6, tie_word_embeddings=True)
    assert DecoderConfig.from_hf(hf.to_dict()) == DecoderConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=6,
        vocab_size=97,
        layernorm_epsilon=1e-5,
        rotary_base=10000.0,
        rope_scaling=None,
        share_embeddings_and_output_weights=True,
        max_position_embeddings=64,
    )


def test_from_hf_reads_transformers_4_and_5_spellings_alike() -> None:
    assert DecoderConfig.from_hf(HF_4) == DecoderConfig.from_hf(HF_5)
    assert DecoderConfig.from_hf(HF_4).rotary_base == 500000.0


def test_from_hf_reads_llama3_scaling_in_both_spellings() -> None:
    old = HF_4 | {"rope_scaling": {"type": "llama3", **LLAMA3}}
    new = HF_5 | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    assert DecoderConfig.from_hf(old).rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_a_config_in_both_spellings_is_the_same_model_for_transformers_4_and_5() -> None:
    scaled = HF_5 | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}
    for config in (HF_4, HF_5, scaled):
        both = in_both_spellings(config)
        old = {key: value for key, value in both.items() if key != "rope_parameters"}
        wanted = DecoderConfig.from_hf(config)
        assert DecoderConfig.from_hf(both) == DecoderConfig.from_hf(old) == wanted
        assert {"rope_theta", "rope_scaling", "torch_dtype"} <= both.keys()
        assert both | config == both


ROPE = {"rope_type": "default", "rope_theta": 1e6}
SCALED = {"rope_type": "llama3", **LLAMA3}


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": ROPE},
        {"rope_scaling": {**SCALED, "rope_theta": 1e6}},
        {"rope_scaling": ROPE, "rope_theta": 1e6},
        {"rope_scaling": ROPE, "rope_parameters": ROPE},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_parameters": None, "rope_theta": 1e6},
        {"rope_parameters": None, "rope_scaling": SCALED},
        {"rope_parameters": None},
    ],
)
def test_from_hf_reads_the_rotary_embedding_that_transformers_reads(change: dict[str, Any]) -> None:
    bare = {key: value for key, value in HF_4.items() if not key.startswith("rope_")} | change
    both = in_both_spellings(bare)
    for config in (bare, both):
        ours = DecoderConfig.from_hf(config)
        # A copy: transformers completes the mapping that it is given.
        peer: Any = LlamaConfig.from_dict(copy.deepcopy(config)).rope_parameters
        assert ours.rotary_base == peer["rope_theta"]
        scaling = {key: value for key, value in peer.items() if key != "rope_theta"}
        assert ours.rope_scaling == (None if scaling["rope_type"] == "default" else scaling)
    # What transformers 4 goes by.
    assert both.get("rope_theta", 1e4) == DecoderConfig.from_hf(bare).rotary_base
    assert "rope_theta" not in (both.get("rope_scaling") or {})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e4},
        {"rope_scaling": SCALED},
        {"rope_scaling": ROPE},
        {"rope_parameters": {**SCALED, "rope_theta": 5e5}, "rope_scaling": SCALED},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": ROPE},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {**SCALED, "rope_theta": 1e6}},
    ],
)
def test_from_hf_refuses_two_spellings_that_contradict_each_other(change: dict[str, Any]) -> None:
    with pytest.raises(NemotronError, match="describes two rotary embeddings"):
        DecoderConfig.from_hf(HF_5 | change)


def test_from_hf_fills_in_what_old_configs_leave_out() -> None:
    left_out = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "architectures")
    config = DecoderConfig.from_hf({k: v for k, v in HF_4.items() if k not in left_out})
    assert (config.num_query_groups, config.kv_channels, config.rotary_base) == (8, 4, 10000.0)
    assert not config.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"model_type": "qwen2"}, "the model is 'LlamaForCausalLM'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_attention_heads": "8"}, "num_attention_heads is '8'; wanted a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; wanted a whole number of 1 or more"),
        ({"head_dim": 4.5}, "head_dim is 4.5; wanted a whole number"),
        ({"rms_norm_eps": [1e-5]}, r"rms_norm_eps is \[1e-05\]; wanted a number"),
        ({"rope_theta": "much"}, "rope_theta is 'much'; wanted a number"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": "x"}}, "factor is 'x'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not divisible"),
    ],
)
def test_from_hf_refuses_what_the_model_does_not_honour(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(NemotronError, match=message) as caught:
        DecoderConfig.from_hf(HF_4 | change)
    assert caught.value.code == "model_unsupported"


def test_from_run_config_agrees_with_the_hugging_face_config() -> None:
    assert DecoderConfig.from_run_config({"model": MEGATRON}) == DecoderConfig.from_hf(HF_4)


def test_from_run_config_reads_the_nested_form_of_builder_configs() -> None:
    outer = {"vocab_size", "seq_length", "share_embeddings_and_output_weights", "rotary_base"}
    nested = {key: value for key, value in MEGATRON.items() if key in outer}
    inner = {key: value for key, value in MEGATRON.items() if key not in outer}
    nested |= {"transformer": inner | {"activation_func": "silu"}}
    assert DecoderConfig.from_run_config({"model": nested}) == DecoderConfig.from_hf(HF_4)


def test_from_run_config_takes_megatrons_constants_of_llama3_scaling() -> None:
    scaled = MEGATRON | {"rope_scaling": True, "rope_scaling_factor": 8.0}
    config = DecoderConfig.from_run_config({"model": scaled})
    assert config.rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_from_run_config_reads_the_constants_that_megatron_bridge_0_2_wrote() -> None:
    own = {"scale_factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
    config = DecoderConfig.from_run_config({"model": MEGATRON | own | {"old_context_len": 512}})
    assert config.rope_scaling == {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 512,
    }


@pytest.mark.parametrize(
    ("scaling", "is_misread"),
    [(None, False), (LLAMA3, False), (LLAMA3 | {"low_freq_factor": 2.0}, True)],
)
def test_other_constants_than_megatrons_are_known_as_such(
    scaling: dict[str, Any] | None, is_misread: bool
) -> None:
    assert megatron_would_misread(scaling) is is_misread


WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 7}, 7),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),  # what transformers takes it to mean
        ({"model_type": "qwen2", **WINDOWED}, 7),
        ({"model_type": "qwen2", **WINDOWED, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", **WINDOWED, "max_window_layers": 3}, None),
        ({"model_type": "qwen3", **WINDOWED, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_from_hf_reads_the_sliding_window(change: dict[str, Any], window: int | None) -> None:
    config = DecoderConfig.from_hf(HF_4 | {"architectures": []} | change)
    assert config.window_size == window


def test_from_hf_refuses_windows_in_some_layers_only() -> None:
    mixed = HF_4 | WINDOWED | {"model_type": "qwen2", "architectures": [], "max_window_layers": 1}
    with pytest.raises(NemotronError, match="some layers have a sliding window"):
        DecoderConfig.from_hf(mixed)


def test_to_hf_refuses_what_no_family_is() -> None:
    config = DecoderConfig.from_run_config(
        {"model": MEGATRON | {"add_qkv_bias": True, "qk_layernorm": True}}
    )
    with pytest.raises(NemotronError, match="no family has both"):
        config.to_hf(dtype_name="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": [6, 6]}, r"window_size is \[6, 6\]"),
        ({"window_size": 7}, "window_size is 7"),
        ({"window_attn_skip_freq": 2}, "window_attn_skip_freq is 2"),
        ({"num_moe_experts": 8}, "num_moe_experts is 8"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'; only 'RMSNorm'"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "gelu"),
        ({"rotary_percent": 0.5}, "rotary_percent is 0.5"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"kv_channels": "4"}, "kv_channels is '4'; wanted a whole number"),
        ({"layernorm_epsilon": "small"}, "layernorm_epsilon is 'small'; wanted a number"),
    ],
)
def test_from_run_config_refuses_what_the_model_does_not_honour(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(NemotronError, match=message) as caught:
        DecoderConfig.from_run_config({"model": MEGATRON | change})
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"hybrid_layer_pattern": "ME*-", "num_moe_experts": 4}, "hybrid_layer_pattern is 'ME"),
        ({"num_moe_experts": 4}, "num_moe_experts is 4"),
        ({"multi_latent_attention": True}, "multi_latent_attention is True"),
    ],
)
def test_from_run_config_names_the_kind_of_a_model_before_its_details(
    kind: dict[str, Any], message: str
) -> None:
    details = {"add_bias_linear": True, "gated_linear_unit": False}
    with pytest.raises(NemotronError, match=message):
        DecoderConfig.from_run_config({"model": MEGATRON | kind | details})
