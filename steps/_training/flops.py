"""How many floating-point operations a LoRA step takes mathematically, to report its TFLOP/s.

These are model operations, not hardware operations, so that the figure compares implementations and
layouts. Not counted are what activation recomputation repeats, what padding or a mask discards, and
everything that is not a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.gpt import GPTModel, LoraTargets
from nemotron.steps._tensor_parallel.collectives import ProcessGroup


@dataclass(frozen=True)
class LoraFlops:
    """Operations of a training step, forward and backward, by what they are proportional to.

    A product of [S, H] and [H, F] takes 2 S H F operations, a multiplication and an addition each.
    With N_base = F H the weights of a linear, N_lora = R (F + H) those of its adapter (rank R):

    - ``per_token``, summed over the linears:
        - forward: 2 N_base of ``x W'``; 2 N_lora of ``x A'`` and ``(x A') B'``.
        - backward of the base: 2 N_base of ``dy W``, the gradient of the input. The base is frozen:
          the 2 N_base of ``dy' x``, a third of full training, never happen.
        - backward of the adapter: 2 N_lora for the gradients of what goes in, ``dy B`` and
          ``(dy B) A``, and 2 N_lora for those of its factors; 6 N_lora with the forward.
        - At the first adapted linear nothing asks for the gradient of the input, and before it
          there is no backward at all: 2 N_base and 2 R H less there, 2 N_base less before.
    - ``per_pair`` of a token and one that it sees, itself included: 4 N D (heads, their width) in
      every layer for its score and its share of the value, and 8 N D backward for the gradients of
      query, key, weight and value. A document of L tokens has L (L + 1) / 2 pairs: causal, and none
      with other documents of the pack.
    - ``per_supervised`` token: 2 H V of the output layer forward, 2 H V backward. Other tokens need
      no logits.
    """

    per_token: float
    per_pair: float
    per_supervised: float

    def of(self, cu_seqlens: Sequence[int], num_supervised: int) -> float:
        """Return the operations of a micro batch, given the boundaries of its documents.

        A micro batch without a supervised token is skipped in training and costs nothing.
        """
        if not num_supervised:
            return 0.0
        lengths = [stop - start for start, stop in pairwise(cu_seqlens)]
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        per_pack = self.per_token * cu_seqlens[-1] + self.per_pair * pairs
        return per_pack + self.per_supervised * num_supervised


def lora_flops(config: DecoderConfig, lora: LoraTargets) -> LoraFlops:
    """Return the operations of a whole model with these adapters, however it is split."""
    # Built without storage, so that the shapes are those that the model gives its linears.
    with torch.device("meta"):
        model = GPTModel(config, lora=lora, group=ProcessGroup(), dtype=torch.bfloat16)
    heads = config.num_attention_heads * config.kv_channels
    per_token = per_pair = 0.0
    has_backward = False
    for linear in model.linears():
        out_features, in_features = linear.weight.shape
        base = out_features * in_features
        per_token += 4 * base if has_backward else 2 * base
        if linear.lora is not None:
            rank = linear.lora.dim
            per_token += 6 * rank * (out_features + in_features)
            per_token -= 0 if has_backward else 2 * rank * in_features
            has_backward = True
        if linear.name.endswith(".linear_qkv"):
            per_pair += heads * (12 if has_backward else 4)
    return LoraFlops(per_token, per_pair, 4.0 * config.hidden_size * config.vocab_size)
