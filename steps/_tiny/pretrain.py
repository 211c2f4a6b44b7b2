"""Pre-training of the tiny base: a Llama decoder in plain torch, on plain text.

The weights carry Hugging Face names from the start. Shapes: B rows, S tokens per row, H hidden,
N heads, K key-value heads, D head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
    "use_cache": True,
}
WARMUP_STEPS = 100
LONG_ROW_INTERVAL = 8


def initial_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Return fp32 weights by Hugging Face name: matrices [out, in] of scale 1 / sqrt(in)."""
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    weights = {
        "model.embed_tokens.weight": 0.02
        * torch.randn(CONFIG["vocab_size"], hidden, generator=generator)
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns) in matrices.items():
            matrix = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
            weights[f"{prefix}.{name}.weight"] = matrix
        weights[f"{prefix}.input_layernorm.weight"] = torch.ones(hidden)
        weights[f"{prefix}.post_attention_layernorm.weight"] = torch.ones(hidden)
    weights["model.norm.weight"] = torch.ones(hidden)
    return weights


def logits(weights: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
    """Return the next-token logits [B, S, V] of token ids [B, S]."""
    embedding_VH = weights["model.embed_tokens.weight"]
    cos_SD, sin_SD = _rotary(ids_BS.shape[1])
    x_BSH = embedding_VH[ids_BS]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        block = {
            name.removeprefix(prefix).removesuffix(".weight"): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        x_BSH = x_BSH + _attention(block, _norm(x_BSH, block["input_layernorm"]), cos_SD, sin_SD)
        normed_BSH = _norm(x_BSH, block["post_attention_layernorm"])
        gate_BSF = F.silu(F.linear(normed_BSH, block["mlp.gate_proj"]))
        up_BSF = F.linear(normed_BSH, block["mlp.up_proj"])
        x_BSH = x_BSH + F.linear(gate_BSF * up_BSF, block["mlp.down_proj"])
    return F.linear(_norm(x_BSH, weights["model.norm.weight"]), embedding_VH)


def pretrain(
    stream: Tensor, *, num_steps: int, step_tokens: int, num_rows: int, seed: int
) -> dict[str, Tensor]:
    """Train from scratch, once through ``stream``, and return the weights.

    Linear warmup, linear decay to zero, gradients clipped to norm 1. Every eighth step is one row
    of ``step_tokens`` instead of ``num_rows`` rows: with short rows alone the loss beyond their
    length rises from 0.8 to 6 nats, and long rows alone take twice the time.

    Args:
        stream: Token ids, at least ``num_steps * step_tokens + 1``.
        num_steps: Optimizer steps.
        step_tokens: Tokens per step.
        num_rows: Rows that a step is cut into.
        seed: Of the initial weights.
    """
    weights = initial_weights(torch.Generator().manual_seed(seed))
    for weight in weights.values():
        weight.requires_grad_()
    optimizers = _optimizers(weights)
    schedules = [
        LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / num_steps))
        for optimizer in optimizers
    ]
    for step in range(num_steps):
        ids = stream[step * step_tokens : (step + 1) * step_tokens + 1]
        rows = 1 if step % LONG_ROW_INTERVAL == LONG_ROW_INTERVAL - 1 else num_rows
        inputs_BS, targets_BS = ids[:-1].view(rows, -1), ids[1:].view(rows, -1)
        loss = F.cross_entropy(logits(weights, inputs_BS).flatten(0, 1), targets_BS.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for updater in (*optimizers, *schedules):
            updater.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}/{num_steps} loss {loss.item():.4f}", flush=True)
    return {name: weight.detach() for name, weight in weights.items()}


def _optimizers(weights: dict[str, Tensor]) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    Muon learns to copy from the context, the slowest thing to come, from a quarter fewer tokens
    than AdamW for all weights.
    """
    matrices = [
        weight for name, weight in weights.items() if weight.ndim == 2 and ".layers." in name
    ]
    others = [weight for weight in weights.values() if weight.ndim == 1]
    others.append(weights["model.embed_tokens.weight"])
    return (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(others, lr=8e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )


def _attention(block: dict[str, Tensor], x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Return causal grouped-query attention over normed hidden states, [B, S, H]."""

    def heads(name: str) -> Tensor:
        projected = F.linear(x_BSH, block[f"self_attn.{name}"])
        return projected.unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2)

    q_BNSD = _rotate(heads("q_proj"), cos_SD, sin_SD)
    k_BKSD = _rotate(heads("k_proj"), cos_SD, sin_SD)
    attended_BNSD = F.scaled_dot_product_attention(
        q_BNSD, k_BKSD, heads("v_proj"), is_causal=True, enable_gqa=True
    )
    return F.linear(attended_BNSD.transpose(1, 2).flatten(2), block["self_attn.o_proj"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, CONFIG["rms_norm_eps"])


def _rotary(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [S, D] of the rotary angles, halves repeated as in Llama."""
    exponents = torch.arange(0, CONFIG["head_dim"], 2) / CONFIG["head_dim"]
    frequencies = CONFIG["rope_theta"] ** -exponents
    angles = torch.outer(torch.arange(num_tokens).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD
