"""The base and the adapters of the convert steps' tests."""

from __future__ import annotations

from tests.steps.convert.conftest import adapter, base_hf, base_megatron, save_adapter, save_base

__all__ = ["adapter", "base_hf", "base_megatron", "save_adapter", "save_base"]
