"""Rows that cannot be used: counted by reason, sampled with their place, never lost in silence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nemotron.artifacts import write_text

SAMPLES_PER_REASON = 100
# These rows were fine, and left out because the config asks for it.
BY_CONFIG = ("used_in", "max_rows", "sample", "weight", "over_long")


class BadRowError(Exception):
    """Why a row cannot be used: ``reason`` is a short name, ``detail`` says it for this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass
class Rejects:
    """The dropped rows of one data set."""

    counts: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, str | int]] = field(default_factory=list)

    def add(self, error: BadRowError, *, file: Path, place: str, position: int) -> None:
        """Count a row; keep its place while the reason has fewer than ``SAMPLES_PER_REASON``."""
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= SAMPLES_PER_REASON:
            self.samples.append(
                {
                    "file": str(file),
                    place: position,
                    "reason": error.reason,
                    "detail": error.detail,
                }
            )

    @property
    def num_bad(self) -> int:
        """Rows that were unusable, without those that the config leaves out."""
        return sum(count for reason, count in self.counts.items() if reason not in BY_CONFIG)


def write_rejects(path: Path, samples: list[dict[str, str | int]]) -> None:
    """Write the samples as JSONL; they hold places and reasons, no text of conversations."""
    write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))
