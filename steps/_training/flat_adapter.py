"""All adapter factors of a rank in one flat buffer, and their gradients in another.

The buffers are laid out [partial | replicated | sharded] (``LoraParameter.kind``). So an optimizer
step needs one all-reduce for the factors of which the tensor-parallel ranks have copies (over all
ranks of the stage) and one for the rest (over the data-parallel ranks), however many layers and
micro batches there are. AdamW works elementwise, so on the flat buffer it equals AdamW on the
factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from nemotron.steps._tensor_parallel.collectives import (
    ProcessGroup,
    all_gather,
    all_reduce,
    broadcast,
)
from nemotron.steps._tensor_parallel.linear import LoraParameter
from nemotron.steps._training.distributed import Layout

_ORDER = ("partial", "replicated", "sharded")
# Elements compared at a time, 16 MiB: a copy of the whole buffer may not fit beside the base.
_COMPARED_AT_ONCE = 1 << 22


class FlatAdapter:
    """Owns the storage of all factors and of their gradients, P elements each.

    Args:
        parameters: Every factor of this rank; their data and gradients become views.
        layout: This rank's groups, and the device of the buffers of a rank without any factor.

    Attributes:
        values: All factors, [P], fp32; its ``grad`` is the flat gradient.
        gradients: The flat gradient, [P].
        parts: Slices of [P] with all ``lora_a`` and with all ``lora_b``, adjacent ones joined.
    """

    def __init__(self, parameters: Iterable[LoraParameter], layout: Layout) -> None:
        self._layout = layout
        ordered = sorted(parameters, key=lambda each: (_ORDER.index(each.kind), _factor(each)))
        factors = [each.parameter.detach().flatten() for each in ordered]
        flat = torch.cat(factors) if factors else torch.zeros(0, device=layout.device)
        self.values = nn.Parameter(flat)
        self.gradients = torch.zeros_like(flat)
        self.values.grad = self.gradients
        sizes = dict.fromkeys(_ORDER, 0)
        self.parts: dict[str, list[slice]] = {"lora_a": [], "lora_b": []}
        self._places: dict[str, tuple[slice, torch.Size]] = {}
        offset = 0
        for each in ordered:
            part = slice(offset, offset + each.parameter.numel())
            shape = each.parameter.shape
            self._places[each.name] = (part, shape)
            each.parameter.data = self.values.data[part].view(shape)
            # autograd adds into an existing gradient in place, so this view stays the gradient.
            each.parameter.grad = self.gradients[part].view(shape)
            _append(self.parts[_factor(each)], part)
            offset = part.stop
            sizes[each.kind] += each.parameter.numel()
        self._num_partial = sizes["partial"]
        self._num_whole = sizes["partial"] + sizes["replicated"]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of the factors in a buffer that is laid out as ``values``, by name."""
        return {name: flat[part].view(shape) for name, (part, shape) in self._places.items()}

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        self.gradients.zero_()

    def reduce_gradients(self) -> None:
        """Complete the gradients by summing them over the ranks, in two collectives at most."""
        num_in_stage = self._num_partial
        if self._layout.data.size > 1:
            # One sum for all copies: separate groups need not add in the same order, so that copies
            # could differ in their last bits (as with NCCL).
            num_in_stage = self._num_whole
            if self._layout.tensor.rank > 0:
                self.gradients[self._num_partial : self._num_whole].zero_()
        all_reduce(self.gradients[:num_in_stage], self._layout.stage)
        all_reduce(self.gradients[num_in_stage:], self._layout.data)

    def gradient_norm(self) -> float:
        """Return the L2 norm over all logical parameters, each counted once whatever the layout."""
        norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
        shared_square = norm(self.gradients[self._num_whole :]).square().reshape(1)
        whole_square = norm(self.gradients[: self._num_whole]).square()
        square = whole_square + all_reduce(shared_square, self._layout.tensor)
        return math.sqrt(float(all_reduce(square, self._layout.pipeline)))

    def replica_difference(self) -> float:
        """Return the largest difference between copies of a factor; not 0.0 only by a defect."""
        values = self.values.detach()
        whole = values[: self._num_whole]
        found = *_spreads(whole, self._layout.tensor), *_spreads(values, self._layout.data)
        own = torch.stack([values.new_zeros(()), *found]).max()
        # Not by an all-reduce: torch's max propagates NaN, NCCL's need not.
        return float(all_gather(own, self._layout.world).max())


def _factor(parameter: LoraParameter) -> str:
    return parameter.name.rsplit(".", 1)[-1]


def _append(parts: list[slice], part: slice) -> None:
    """Append a part, joined with the last one if they are adjacent."""
    is_adjacent = parts and parts[-1].stop == part.start
    parts.append(slice(parts.pop().start, part.stop) if is_adjacent else part)


def _spreads(tensor: Tensor, group: ProcessGroup) -> Iterator[Tensor]:
    """Yield this rank's largest absolute difference to the first rank's, of each part."""
    has_copies = group.size > 1 and tensor.numel() > 0  # a stage may have no factor at all
    for part in tensor.split(_COMPARED_AT_ONCE) if has_copies else ():
        yield broadcast(part, group).sub_(part).abs_().max()
