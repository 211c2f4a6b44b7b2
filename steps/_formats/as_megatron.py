"""Any weights under Megatron's names, so that a model can start from a Hugging Face directory."""

from __future__ import annotations

from torch import Tensor

from nemotron.steps._formats.weights import Weights
from nemotron.steps._models.layouts import join_rows, weight_rules


class AsMegatron:
    """Reads weights by Megatron's names, whole or sliced, as ``MegatronCheckpoint`` does.

    Args:
        weights: Weights under their Hugging Face names.
    """

    def __init__(self, weights: Weights) -> None:
        self.config = weights.config
        self._weights = weights
        self._rules = {rule.megatron: rule for rule in weight_rules(weights.config)}
        # Both halves of linear_fc1 are asked for one after the other.
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def read(
        self,
        name: str,
        *,
        layer: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """Return one tensor, or the slice asked for, of one layer where it is layered."""
        if self._last is not None and self._last[0] == (name, layer):
            tensor = self._last[1]
        else:
            self._last = None
            rule = self._rules[name]
            parts = [self._weights.read(part.format(layer=layer)) for part in rule.hf]
            tensor = join_rows(parts, layout=rule.layout, config=self.config)
            if len(parts) > 1:
                self._last = (name, layer), tensor
        tensor = tensor[rows] if rows else tensor
        return tensor[:, columns] if columns else tensor
