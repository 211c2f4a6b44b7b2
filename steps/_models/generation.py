"""Greedy decoding, for looking at what a model has learnt; not a server."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemotron.steps._models.gpt import GPTModel


@torch.no_grad()
def generate_greedily(
    model: GPTModel, prompt: Sequence[int], *, end_id: int, max_new_tokens: int
) -> list[int]:
    """Return the most likely continuation of a prompt, up to and without ``end_id``.

    Every token runs the whole sequence again: no cache, cost quadratic in the length.

    Args:
        model: A model on one rank (tensor-parallel size 1).
        prompt: Token ids.
        end_id: Id that ends the answer.
        max_new_tokens: Bound on the answer, tokens.
    """
    ids = list(prompt)
    for _ in range(max_new_tokens):
        tokens_S = torch.tensor(ids, device=model.output_weight.device)
        next_id = int(model.logits(model(tokens_S, (0, len(ids)))[-1:]).argmax())
        if next_id == end_id:
            break
        ids.append(next_id)
    return ids[len(prompt) :]
