"""The two ends of the model, split over the vocabulary: embedding, and linear + cross entropy.

Rank r of T owns the rows [r ceil(V / T), (r + 1) ceil(V / T)) of the table. The last shard may be
shorter, so that the vocabulary need not be divisible by T and nothing is padded.

S tokens, H hidden, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_gather,
    all_reduce,
    gather_rows,
    scatter_sum_rows,
)

# Logits that exist at a time, fp32 elements: 8 MiB, or those of 256 tokens if that is more.
_LOGITS_AT_ONCE = 1 << 21
_LEAST_TOKENS_AT_ONCE = 256


def vocabulary_rows(vocab_size: int, group: ProcessGroup) -> slice:
    """Return the rows of the vocabulary that this rank owns.

    Raises:
        ValueError: The vocabulary is so small that a rank would own none.
    """
    part = _rows_per_rank(vocab_size, group)
    if (group.size - 1) * part >= vocab_size:
        size = f"tensor_model_parallel_size {group.size}"
        raise ValueError(f"vocab_size {vocab_size} leaves a rank without rows at {size}")
    return slice(group.rank * part, min((group.rank + 1) * part, vocab_size))


class VocabParallelEmbedding(nn.Module):
    """A frozen embedding, split over the vocabulary: token ids [S] -> [S, H], one all-reduce.

    With ``sequence_parallel`` one reduce-scatter gives this rank's rows instead, [S / T, H].
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        group: ProcessGroup,
        dtype: torch.dtype,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.rows = vocabulary_rows(vocab_size, group)
        self.weight: Tensor
        shape = (self.rows.stop - self.rows.start, hidden_size)
        self.register_buffer("weight", torch.empty(shape, dtype=dtype))

    def forward(self, tokens_S: Tensor) -> Tensor:
        if self.group.size == 1:
            return self.weight[tokens_S]
        local_S = tokens_S - self.rows.start
        mine_S = (local_S >= 0) & (local_S < len(self.weight))
        # Indexing by a mask would make the host wait for the GPU to count the elements.
        out_SH = self.weight[local_S.clamp(0, len(self.weight) - 1)]
        out_SH.masked_fill_(~mine_S.unsqueeze(1), 0.0)
        if self.sequence_parallel:
            return scatter_sum_rows(out_SH, self.group)
        return all_reduce(out_SH, self.group)


def gather_sequence(x_SH: Tensor, group: ProcessGroup) -> Tensor:
    """Return the whole sequence, [S, H], of every rank's rows, [S / T, H], for the output layer.

    The gradient of the cross entropy is complete on every rank, so backward takes this rank's rows
    of it and sends nothing.
    """
    return _GatherSequence.apply(x_SH, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, group: ProcessGroup) -> Tensor:
        ctx.own_rows = slice(group.rank * len(x_SH), (group.rank + 1) * len(x_SH))
        return gather_rows(x_SH, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return grad_outputs[0][ctx.own_rows], None


def linear_cross_entropy(
    x_SH: Tensor, weight_VH: Tensor, labels_S: Tensor, *, vocab_size: int, group: ProcessGroup
) -> Tensor:
    """Return the cross entropy of every token, [S] fp32, without ever holding the logits [S, V].

    Args:
        x_SH: Final hidden states, replicated over the group.
        weight_VH: This rank's rows of the output layer, frozen.
        labels_S: Target ids, int64, in [0, vocab_size).
        vocab_size: V, of all ranks together.
        group: The tensor-parallel group.
    """
    return _LinearCrossEntropy.apply(x_SH, weight_VH, labels_S, vocab_size, group)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of ``x W^T`` with W split over the vocabulary and frozen.

    Per rank, chunk by chunk of C tokens:

        logits  [C, V / T] = x W^T
        stats   [T, C, 3]  = all_gather(max, sum exp(logits - max), logit of the label)
        loss    [C]        = log sum exp over all ranks - logit of the label
        dx      [C, H]     = (softmax(logits) - onehot) W          partial

    and one all-reduce of dx [S, H] at the end. The gradient is computed in the forward pass, while
    the chunk's logits exist, as if each token's incoming gradient were one; backward scales it per
    token. Saved: dx.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        weight_VH: Tensor,
        labels_S: Tensor,
        vocab_size: int,
        group: ProcessGroup,
    ) -> Tensor:
        needs_dx = ctx.needs_input_grad[0]
        loss_S = x_SH.new_empty(len(x_SH), dtype=torch.promote_types(x_SH.dtype, torch.float32))
        dx_SH = torch.empty_like(x_SH) if needs_dx else None
        first_row = vocabulary_rows(vocab_size, group).start
        # The same on every rank even if its shard is shorter: every chunk is a collective.
        chunk_tokens = _LOGITS_AT_ONCE // _rows_per_rank(vocab_size, group)
        chunk_tokens = max(_LEAST_TOKENS_AT_ONCE, chunk_tokens)
        for start in range(0, len(x_SH), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = (x_SH[chunk] @ weight_VH.T).to(loss_S.dtype)
            local_C = labels_S[chunk] - first_row
            loss_S[chunk], scale_C = _loss_of_chunk(logits_CV, local_C, group)
            if dx_SH is not None:
                dlogits_CV = _softmax_minus_onehot(logits_CV, scale_C, local_C)
                torch.mm(dlogits_CV.to(x_SH.dtype), weight_VH, out=dx_SH[chunk])
        if dx_SH is not None:
            ctx.save_for_backward(all_reduce(dx_SH, group))
        return loss_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dx_SH,) = ctx.saved_tensors
        scaled = dx_SH * grad_outputs[0].unsqueeze(1).to(dx_SH.dtype)
        return scaled, None, None, None, None


def _rows_per_rank(vocab_size: int, group: ProcessGroup) -> int:
    return -(-vocab_size // group.size)


def _loss_of_chunk(
    logits_CV: Tensor, local_C: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Return the loss [C], one all-gather, and turn ``logits_CV`` into exponentials, in place.

    The second result, [C], scales those to the softmax over all ranks.
    """
    mine_C, index_C1 = _own_labels(local_C, logits_CV)
    label_C = logits_CV.gather(1, index_C1).squeeze(1) * mine_C
    max_C = logits_CV.amax(dim=1)
    sum_C = logits_CV.sub_(max_C.unsqueeze(1)).exp_().sum(dim=1)
    stats = all_gather(torch.stack([max_C, sum_C, label_C]), group)
    max_TC, sum_TC, label_TC = stats.unbind(dim=1)
    top_C = max_TC.amax(dim=0)
    log_sum_C = (sum_TC * (max_TC - top_C).exp()).sum(dim=0).log() + top_C
    return log_sum_C - label_TC.sum(dim=0), (max_C - log_sum_C).exp()


def _softmax_minus_onehot(exponentials_CV: Tensor, scale_C: Tensor, local_C: Tensor) -> Tensor:
    """Turn ``exponentials_CV`` into the softmax minus the onehot of the label, in place."""
    dlogits_CV = exponentials_CV.mul_(scale_C.unsqueeze(1))
    mine_C, index_C1 = _own_labels(local_C, dlogits_CV)
    return dlogits_CV.scatter_add_(1, index_C1, -mine_C.to(dlogits_CV).unsqueeze(1))


def _own_labels(local_C: Tensor, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels are among this rank's columns, [C], and the column, [C, 1]; 0 if not."""
    mine_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
    return mine_C, (local_C * mine_C).unsqueeze(1)
