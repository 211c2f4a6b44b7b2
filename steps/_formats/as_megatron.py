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

    def read(
        self,
        name: str,
        *,
        layer: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """Return one tensor, or the slice asked for, of one layer where it is layered."""
        rule = self._rules[name]
        names = [part.format(layer=layer) for part in rule.hf]
        first, last, _ = (rows or slice(None)).indices(rule.shape[0])
        gate_rows = rule.shape[0] // 2
        if rule.layout == "gate_up" and last <= gate_rows:
            tensor = self._weights.read(names[0])
        elif rule.layout == "gate_up" and first >= gate_rows:
            tensor = self._weights.read(names[1])
            first, last = first - gate_rows, last - gate_rows
        else:
            parts = [self._weights.read(name) for name in names]
            tensor = join_rows(parts, layout=rule.layout, config=self.config)
        return tensor[first:last, columns] if columns else tensor[first:last]
