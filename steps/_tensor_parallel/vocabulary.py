"""The two ends of the model, split over the vocabulary: embedding, and linear + cross entropy.

Rank r of T owns the rows [r ceil(V / T), (r + 1) ceil(V / T)) of the table. The last shard may be
shorter, so that the vocabulary need not be divisible by T and nothing is padded.

S tokens, H hidden, V vocabulary, T tensor-parallel size.
"""

from __future__ import annotations

from types import ModuleType
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
from nemotron.steps._tensor_parallel.kernels import kernels_for

# Logits that exist at a time, elements, at least those of _LEAST_TOKENS_AT_ONCE: few enough for the
# cache of a CPU; on a GPU so many that reading the weight takes less time than multiplying by it.
_LOGITS_AT_ONCE = 1 << 21
_LOGITS_AT_ONCE_ON_GPU = 1 << 27
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
        chunk_tokens = _chunk_tokens(_rows_per_rank(vocab_size, group), x_SH.device)
        for start in range(0, len(x_SH), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits_CV = x_SH[chunk] @ weight_VH.T
            softmax = _softmax(logits_CV, labels_S[chunk] - first_row)
            loss_S[chunk], log_sum_C = _loss_of_chunk(softmax.statistics, group)
            if dx_SH is not None:
                dlogits_CV = softmax.minus_onehot(log_sum_C)
                torch.mm(dlogits_CV, weight_VH, out=dx_SH[chunk])
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


def _chunk_tokens(columns: int, device: torch.device) -> int:
    """Return the tokens of a chunk: a multiple of the least, so that a GPU's tiles are full."""
    at_once = _LOGITS_AT_ONCE_ON_GPU if device.type == "cuda" else _LOGITS_AT_ONCE
    least = _LEAST_TOKENS_AT_ONCE
    return max(at_once // columns // least, 1) * least


def _loss_of_chunk(statistics_3C: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the loss and the logarithm of the sum of all exponentials, [C] each; one all-gather.

    Args:
        statistics_3C: Maximum, ``sum exp(logit - maximum)`` and the label's logit of this rank's
            columns.
        group: The tensor-parallel group.
    """
    max_TC, sum_TC, label_TC = all_gather(statistics_3C, group).unbind(dim=1)
    top_C = max_TC.amax(dim=0)
    log_sum_C = (sum_TC * (max_TC - top_C).exp()).sum(dim=0).log() + top_C
    return log_sum_C - label_TC.sum(dim=0), log_sum_C


def _softmax(logits_CV: Tensor, local_C: Tensor) -> _Softmax | _FusedSoftmax:
    """Return the softmax of a chunk's logits, which are overwritten.

    Args:
        logits_CV: This rank's columns of the logits.
        local_C: Labels as numbers of these columns; other ranks' labels are not among them.
    """
    kernels = kernels_for(logits_CV)
    if kernels is not None:
        return _FusedSoftmax(logits_CV, local_C, kernels)
    return _Softmax(logits_CV, local_C)


class _Softmax:
    """A softmax in fp32 by torch's operations.

    Attributes:
        statistics: See ``_loss_of_chunk``.
    """

    def __init__(self, logits_CV: Tensor, local_C: Tensor) -> None:
        self._dtype = logits_CV.dtype
        wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        self._mine_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
        self._index_C1 = (local_C * self._mine_C).unsqueeze(1)
        label_C = wide_CV.gather(1, self._index_C1).squeeze(1) * self._mine_C
        self._max_C = wide_CV.amax(dim=1)
        self._exponentials_CV = wide_CV.sub_(self._max_C.unsqueeze(1)).exp_()
        self.statistics = torch.stack([self._max_C, self._exponentials_CV.sum(dim=1), label_C])

    def minus_onehot(self, log_sum_C: Tensor) -> Tensor:
        """Return the softmax over all ranks minus the onehot of the label; can be called once."""
        scale_C = (self._max_C - log_sum_C).exp()
        dlogits_CV = self._exponentials_CV.mul_(scale_C.unsqueeze(1))
        onehot_C1 = self._mine_C.to(dlogits_CV).unsqueeze(1)
        return dlogits_CV.scatter_add_(1, self._index_C1, -onehot_C1).to(self._dtype)


class _FusedSoftmax:
    """The same by two kernels; the second one writes over the logits."""

    def __init__(self, logits_CV: Tensor, local_C: Tensor, kernels: ModuleType) -> None:
        self._logits_CV, self._local_C, self._kernels = logits_CV, local_C, kernels
        self.statistics: Tensor = kernels.softmax_statistics(logits_CV, local_C)

    def minus_onehot(self, log_sum_C: Tensor) -> Tensor:
        return self._kernels.softmax_minus_onehot_(self._logits_CV, log_sum_C, self._local_C)
