"""Rows that cannot be used: all are counted by reason, and some are listed with their place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron.artifacts import write_text

SAMPLES_PER_REASON = 100
# Reasons of rows that were fine, but left out because the config asks for it.
BY_CONFIG = ("used_in", "max_rows", "sample", "weight", "over_long", "in_other_split")

# Reasons of rows that may be fine: it is the chat template that cannot render them.
BY_TEMPLATE = (
    "template_error",
    "template_not_prefix_stable",
    "tools_not_rendered",
    "reasoning_not_rendered",
    "generation_moved",
    "spans_not_per_turn",
)


class BadRowError(Exception):
    """Why a row cannot be used: ``reason`` is a short name, ``detail`` explains it for this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def write_rejects(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write the samples as JSONL; they hold places and reasons, no text of conversations."""
    write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))
