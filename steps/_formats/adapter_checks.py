"""Checks that an adapter in PEFT's layout is plain LoRA, with exactly the tensors of its config."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from nemotron.steps._formats.adapter_targets import refuse_bad_pattern
from nemotron.steps._formats.lora import MERGE_IN_PEFT, adapter_error
from nemotron.steps._formats.safetensors_file import SafetensorsFile
from nemotron.steps._formats.weights import damaged
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import lora_shapes

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# The fields that scale the tensors are also written into their file: if alpha were changed in the
# config alone, the adapter would load everywhere and do something else.
SCALING = "lora_scaling"
# Each of these makes an adapter do or hold something other than two factors per linear. All other
# fields are only for training, or only have an effect together with one of these.
_NOT_HONOURED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# PEFT's initialisations that do not change the base. PiSSA, OLoRA, CorDA and LoRA-GA move a part of
# it into the factors, and LoftQ quantises it; the changed base is not saved. Such factors, added to
# the original base, make another model. Source: PEFT 0.21.2, lora/layer.py.
_INITS_BESIDE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
_CONVERT_TO_PLAIN = (
    "save it in PEFT as plain LoRA: model.save_pretrained(DIR, path_initial_model_for_weight_"
    "conversion=INITIAL), where INITIAL is the adapter as saved before training; a LoftQ "
    "adapter fits only its quantised base: merge it in PEFT"
)


def tensor_names(module: str) -> tuple[str, str]:
    """Return PEFT's names of a module's lora_A and lora_B."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


_Number = TypeVar("_Number", int, float)


def by_pattern(pattern: Mapping[str, _Number], module: str, *, default: _Number) -> _Number:
    """Return the value of the first key that names a module, as PEFT looks it up."""
    own = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(own, default)


def check_pattern(path: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return ``rank_pattern`` (counts) or ``alpha_pattern`` (numbers) after checking it."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise adapter_error("config", path, f"{key} is {pattern!r}; wanted numbers by module")
    kinds = int if key == "rank_pattern" else int | float
    for module, value in pattern.items():
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or (key == "rank_pattern" and value < 1):
            raise adapter_error(
                "config", path, f"{key} sets {module} to {value!r}; wanted a number"
            )
        refuse_bad_pattern(path, key, module)
    return pattern


def check_config(path: Path, values: Mapping[str, Any]) -> tuple[int, float]:
    """Return rank and alpha of an adapter that is plain LoRA."""
    if values.get("peft_type") != "LORA":
        raise adapter_error(
            "config", path, f"peft_type is {values.get('peft_type')!r}; wanted LORA"
        )
    for key in ("bias", *_NOT_HONOURED):
        value = values.get(key)
        if value and (key, value) != ("bias", "none"):
            problem = f"{key} is {value!r}, which is not supported"
            raise adapter_error("config", path, problem, fix=MERGE_IN_PEFT)
    _check_init(path, values.get("init_lora_weights"))
    use_rslora = values.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        raise adapter_error("config", path, f"use_rslora is {use_rslora!r}; wanted true or false")
    dim: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    dropout: Any = values.get("lora_dropout") or 0.0
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise adapter_error("config", path, f"r is {dim!r}; wanted a number of 1 or more")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise adapter_error("config", path, f"{key} is {value!r}; wanted a number")
    return dim, float(alpha)


def _check_init(path: Path, init: Any) -> None:
    """Refuse an adapter whose initialisation has changed its base, or may have."""
    if init is None or isinstance(init, bool) or str(init).lower() in _INITS_BESIDE_THE_BASE:
        return
    wanted = f"a bool, {', '.join(_INITS_BESIDE_THE_BASE)}, which leave the base as it is"
    problem = f"init_lora_weights is {init!r}; wanted {wanted}"
    raise adapter_error("config", path, problem, fix=_CONVERT_TO_PLAIN)


def wanted_shapes(
    modules: Iterable[str], *, dim: int, rank_pattern: Mapping[str, int], config: DecoderConfig
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that an adapter on these modules has."""
    linears = lora_shapes(config)
    wanted: dict[str, tuple[int, ...]] = {}
    for module in modules:
        name_a, name_b = tensor_names(module)
        own_dim = by_pattern(rank_pattern, module, default=dim)
        wanted[name_a] = (own_dim, linears[module][1])
        wanted[name_b] = (linears[module][0], own_dim)
    return wanted


def check_scaling(path: Path, values: Mapping[str, Any], file: SafetensorsFile) -> None:
    """Check rank and alpha of the config against those that our writer put beside the tensors."""
    try:
        written = dict(json.loads(file.metadata.get(SCALING, "{}")))
    except (ValueError, TypeError):
        raise damaged(file.path, f"its {SCALING} does not parse") from None
    for key, wanted in written.items():
        got = values.get(key) or (False if key == "use_rslora" else {})
        if got != wanted:
            kind = "rank" if key in ("r", "rank_pattern") else "alpha"
            problem = f"{key} is {got}, but {file.path.name} was saved with {wanted}"
            raise adapter_error(kind, path, problem)


def check_keys(file: SafetensorsFile, wanted: Mapping[str, Any]) -> None:
    """Check that a file has exactly the wanted tensors."""
    missing = sorted(set(wanted) - set(file.entries))
    unexpected = sorted(set(file.entries) - set(wanted))
    if missing and len(missing) == len(unexpected) == len(wanted):
        _refuse_prefix(file, missing[0])
    if missing:
        for half in (".lora_A.weight", ".lora_B.weight"):
            if set(missing) == {name for name in wanted if name.endswith(half)}:
                problem = f"every tensor *{half} is missing ({len(missing)}): one half of each pair"
                raise adapter_error("half_missing", file.path, problem)
        close = get_close_matches(missing[0], unexpected, n=1)
        hint = f" (the file has {close[0]})" if close else ""
        problem = f"missing tensors: {len(missing)} of {len(wanted)}, first {missing[0]}{hint}"
        raise adapter_error("keys_missing", file.path, problem)
    if unexpected:
        close = get_close_matches(unexpected[0], list(wanted), n=1)
        hint = f" (closest: {close[0]})" if close else ""
        problem = f"unexpected tensors: {len(unexpected)}, first {unexpected[0]}{hint}"
        raise adapter_error("keys_unexpected", file.path, problem)


def _refuse_prefix(file: SafetensorsFile, wanted: str) -> None:
    """Refuse a file whose tensors all have another prefix: PEFT would load none of them."""
    core = wanted.removeprefix(f"{PREFIX}model.")
    found = next((name for name in file.entries if name.endswith(core)), None)
    if found is not None:
        prefixes = f"{found.removesuffix(core)!r}; wanted {wanted.removesuffix(core)!r}"
        raise adapter_error("prefix", file.path, f"its tensors have the prefix {prefixes}")


def check_shape(file: SafetensorsFile, name: str, wanted: tuple[int, ...]) -> None:
    """Check a tensor's shape; a wrong rank is named as such."""
    got = file.entries[name].shape
    if got == wanted:
        return
    rank_dim = 0 if name.endswith(".lora_A.weight") else 1
    is_rank = len(got) == 2 and got[1 - rank_dim] == wanted[1 - rank_dim]
    if is_rank:
        problem = f"{name} has rank {got[rank_dim]}; {ADAPTER_CONFIG} says {wanted[rank_dim]}"
        raise adapter_error("rank", file.path, problem)
    problem = f"{name} has shape {list(got)}; its rank and the base require {list(wanted)}"
    raise adapter_error("shape", file.path, problem)
