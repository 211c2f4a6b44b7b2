"""Presents any weights under Megatron's names: to train from them, or to write them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nemotron.steps._formats.weights import Weights
from nemotron.steps._models.layouts import join_rows, row_runs, weight_rules


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

    def blocks(self, name: str, *, layer: int | None = None) -> Iterator[Tensor]:
        """Yield one tensor as blocks of its rows; see ``Weights.blocks``."""
        rule = self._rules[name]
        parts = [_Rows(self._weights.blocks(part.format(layer=layer))) for part in rule.hf]
        for part, num_rows in row_runs(rule, self.config):
            yield from parts[part].take(num_rows)
        for part in parts:
            part.end()


class _Rows:
    """Hands out the rows of one tensor in other portions than the blocks that they come in."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._rest = next(blocks)

    def take(self, num_rows: int) -> Iterator[Tensor]:
        """Yield the next ``num_rows`` rows, in one block or more.

        Raises:
            ValueError: There are fewer.
        """
        while num_rows > 0:
            if len(self._rest) == 0:
                block = next(self._blocks, None)
                if block is None:
                    raise ValueError("a tensor has fewer rows than its rule says")
                self._rest = block
            rows, self._rest = self._rest[:num_rows], self._rest[num_rows:]
            num_rows -= len(rows)
            yield rows

    def end(self) -> None:
        """Run the iterator of the blocks to its end.

        Raises:
            ValueError: There are rows left.
        """
        if len(self._rest) > 0 or next(self._blocks, None) is not None:
            raise ValueError("a tensor has more rows than its rule says")
