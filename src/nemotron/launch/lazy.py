"""Imports nemo-run for both backends, only at a submission: the import takes seconds."""

from __future__ import annotations

import warnings
from types import ModuleType

from nemotron.launch.signals import Interrupts


def load_nemo() -> ModuleType:
    """Return the module that imports nemo-run."""
    with Interrupts() as interrupts, interrupts.blamed_for_failures(), warnings.catch_warnings():
        interrupts.keep_from_now_on()
        warnings.simplefilter("ignore")  # its imports deprecate each other
        from nemotron.launch import nemo
    interrupts.raise_received()
    return nemo
