"""Parquet: the mask is shifted inside each document, never across."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemotron.steps.data_prep.sft_packing.parquet import shifted_mask


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6))
def test_shifted_mask_is_that_of_each_document_alone(documents: list[list[int]]) -> None:
    mask = np.array([flag for document in documents for flag in document], dtype=np.uint8)
    ends = np.cumsum([len(document) for document in documents])
    expected = [flag for document in documents for flag in [*document[1:], 0]]
    assert shifted_mask(mask, ends).tolist() == expected
