"""Which modules a PEFT config adapts: its targets, without those that other fields exclude.

PEFT accepts entries that name nothing, and so does this: the tensors are checked against the
modules that are adapted.

Source: PEFT 0.21.2, tuners/tuners_utils.py, check_target_module_exists; lora/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nemotron.steps._formats.lora import MERGE_IN_PEFT, adapter_error
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import LORA_TARGETS, lora_shapes

_EMBEDDINGS = ("model.embed_tokens", "lm_head")


def adapted_modules(path: Path, values: Mapping[str, Any], config: DecoderConfig) -> list[str]:
    """Return the linears of a decoder that a PEFT config adapts, in the order of the model.

    Args:
        path: The config's file, for errors.
        values: The config.
        config: Sizes of the decoder.

    Raises:
        NemotronError: ``adapter_config``: a field has a type or a combination that PEFT does not
            take, it adapts something else than linears of the decoder, or nothing.
    """
    linears = list(lora_shapes(config))
    targets = _names(path, values, "target_modules")
    if not targets:
        problem = f"target_modules is {targets!r}; wanted a list of names or a pattern"
        raise adapter_error("config", path, problem)
    excluded = _names(path, values, "exclude_modules")
    layers, layers_patterns = _layers(path, values)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = linears  # PEFT leaves the output layer out
    adapted = [
        module
        for module in (*linears, *_EMBEDDINGS)
        if not _is_named(module, excluded)
        and _is_named(module, targets)
        # A module that is named in full is adapted whatever the layers are.
        and (layers is None or module in targets or _layer(module, layers_patterns) in layers)
    ]
    for module in adapted:
        if module in _EMBEDDINGS:
            problem = f"{module} is adapted; adapters on embeddings or lm_head are not supported"
            raise adapter_error("config", path, problem, fix=MERGE_IN_PEFT)
    if not adapted:
        raise adapter_error("config", path, f"it adapts no module of the base: {_hint(targets)}")
    return adapted


def refuse_bad_pattern(path: Path, key: str, pattern: str) -> None:
    """Refuse a regular expression that does not compile."""
    try:
        re.compile(pattern)
    except re.error as error:
        problem = f"{key}: {pattern!r} is not a valid pattern: {error}"
        raise adapter_error("config", path, problem) from None


def _names(path: Path, values: Mapping[str, Any], key: str) -> str | list[str]:
    """Return a list of names, or a pattern for whole names; empty if the field is not set."""
    names = values.get(key) or []
    if isinstance(names, str):
        refuse_bad_pattern(path, key, names)
    elif not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem = f"{key} is {names!r}; wanted a list of names or a pattern"
        raise adapter_error("config", path, problem)
    return names


def _layers(path: Path, values: Mapping[str, Any]) -> tuple[list[int] | None, list[str]]:
    """Return the layers that are adapted (None: all), and patterns for the name of their list.

    PEFT accepts neither together with a pattern in ``target_modules``.
    """
    given, patterns = values.get("layers_to_transform"), values.get("layers_pattern") or []
    layers = [given] if isinstance(given, int) else given or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        problem = f"layers_to_transform is {given!r}; wanted layer numbers"
        raise adapter_error("config", path, problem)
    if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
        raise adapter_error("config", path, f"layers_pattern is {patterns!r}; wanted names")
    for pattern in patterns:
        refuse_bad_pattern(path, "layers_pattern", pattern)
    if (layers or patterns) and isinstance(values["target_modules"], str):
        problem = "layers_to_transform and layers_pattern need a list of names in target_modules"
        raise adapter_error("config", path, problem)
    if patterns and given is None:
        raise adapter_error("config", path, "layers_pattern needs layers_to_transform")
    return layers or None, patterns


def _is_named(module: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _layer(module: str, patterns: Iterable[str]) -> int | None:
    """Return the index of a module's layer in a list that a pattern names; None if in none."""
    for pattern in patterns or [r"[^.]*"]:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
        if match:
            return int(match["layer"])
    return None


def _hint(targets: str | list[str]) -> str:
    if isinstance(targets, str):
        return f"target_modules is the pattern {targets!r}"
    leaves = [leaf for group in LORA_TARGETS.values() for leaf in group]
    close = get_close_matches(targets[0].rsplit(".", 1)[-1], leaves, n=1)
    return f"none is named {targets[0]}" + (f" (closest: {close[0]})" if close else "")
