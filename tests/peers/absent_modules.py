"""Modules that Megatron-Bridge imports on every path and a CPU cannot have, as empty ones.

No function of theirs is called where layers are Megatron-Core's own: they only have to be there.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import torch

_ABSENT = (
    "causal_conv1d",
    "comet_ml",
    "datasets",
    "diffusers",
    "fla",
    "mamba_ssm",
    "mlflow",
    "modelopt",
    "nvidia_resiliency_ext",
    "transformer_engine",
)
_VERSION = "2.10.0"  # Transformer Engine's, which Megatron-Core asks for by name


class _EmptyModule(ModuleType):
    __version__ = _VERSION

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        """Return a class for a name that looks like one, else a module that does nothing."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = type(name, (torch.nn.Module,), {})
        else:
            value = sys.modules[f"{self.__name__}.{name}"] = _EmptyModule(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install_absent_modules() -> None:
    """Make the absent modules importable, for those that are looked for last."""
    known = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        _VERSION if name.replace("-", "_") in _ABSENT else known(name)
    )
    sys.meta_path.append(_Finder())
