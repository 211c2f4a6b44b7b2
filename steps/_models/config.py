"""The shape of a decoder, read from a Hugging Face config or from Megatron-Bridge's run config.

Only what the model code honours is accepted. A config that asks for anything else (another
architecture, an unknown rope scaling) is refused here, before a weight is read, because a model
that ignores a field gives plausible and wrong logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nemotron.steps._models.families import hf_from_sizes, sizes_from_hf
from nemotron.steps._models.fields import unsupported
from nemotron.steps._models.run_config import model_section, sizes_from_run_config


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder, in Megatron's names.

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
        add_qkv_bias: Whether q, k and v have a bias (Qwen2).
        qk_layernorm: Whether every query and key head is RMS-normed before its rotation (Qwen3).
        window_size: Tokens that a token sees, itself included (Mistral); None: all before it.
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
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    window_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_query_groups:
            raise unsupported(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.num_query_groups}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Return the sizes that a ``config.json`` states, in transformers 4 or 5 spelling.

        Raises:
            NemotronError: ``model_unsupported``: an architecture of none of the families, a field
                that the model code does not honour, or a missing field.
        """
        return cls(**sizes_from_hf(config))

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> DecoderConfig:
        """Return the sizes that the ``model`` section of a ``run_config.yaml`` states.

        Raises:
            NemotronError: ``model_unsupported``, as in ``from_hf``.
        """
        return cls(**sizes_from_run_config(run_config))

    def to_hf(self, *, dtype_name: str) -> dict[str, Any]:
        """Return a ``config.json`` that ``from_hf`` reads as these sizes; see ``families``."""
        return hf_from_sizes(asdict(self), dtype_name=dtype_name)

    def to_run_config(self, *, dtype_name: str, source_name: str) -> dict[str, Any]:
        """Return the ``model`` section of a ``run_config.yaml``; see ``run_config``."""
        return model_section(asdict(self), dtype_name=dtype_name, source_name=source_name)
