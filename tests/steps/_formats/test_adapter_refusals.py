"""Adapters that would do harm, or are not plain LoRA, are refused, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.adapter import open_adapter
from nemotron.steps._models.config import DecoderConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def _error(directory: Path, config: DecoderConfig) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        open_adapter(directory, config=config)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


def _change_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def _change_config(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(values), encoding="utf-8")


def test_open_refuses_tensors_that_the_layers_of_the_config_leave_out(
    adapter: Path, config: DecoderConfig
) -> None:
    _change_config(adapter, layers_to_transform=[0])
    assert _error(adapter, config).code == "adapter_keys_unexpected"


# What says how an adapter is trained, loaded or found, and not what it adds to the weights.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("ensure_weight_tying", "qalora_group_size", "runtime_config", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # see init_lora_weights
    *("megatron_config", "megatron_core"),  # of Megatron's linears, which have other names
}


@pytest.mark.parametrize("field", [field.name for field in fields(LoraConfig)])
def test_every_field_of_peft_is_honoured_refused_or_without_effect(
    adapter: Path, config: DecoderConfig, field: str
) -> None:
    _change_config(adapter, **{field: {"a field": "of a later day"}})
    if field in WITHOUT_EFFECT:
        open_adapter(adapter, config=config)
    else:
        with pytest.raises(NemotronError, match=field):
            open_adapter(adapter, config=config)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_open_names_a_missing_half(adapter: Path, config: DecoderConfig, half: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if half in name:
                tensors.pop(name)

    _change_weights(adapter, drop)
    error = _error(adapter, config)
    assert error.code == "adapter_half_missing"
    assert f"every tensor *.{half}.weight is missing (8)" in error.problem


def test_open_names_a_missing_tensor(adapter: Path, config: DecoderConfig) -> None:
    _change_weights(adapter, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"))
    error = _error(adapter, config)
    assert error.code == "adapter_keys_missing"
    assert f"missing tensors: 1 of 16, first {Q_PROJ}.lora_B.weight" in error.problem


def test_open_names_a_wrong_prefix(adapter: Path, config: DecoderConfig) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    _change_weights(adapter, rename)
    error = _error(adapter, config)
    assert error.code == "adapter_prefix"
    assert "prefix 'model.'; wanted 'base_model.model.model.'" in error.problem


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}]
)
def test_open_names_a_scale_that_was_changed_after_the_save(
    adapter: Path, config: DecoderConfig, changes: dict[str, Any]
) -> None:
    _change_config(adapter, **changes)
    error = _error(adapter, config)
    assert error.code == "adapter_alpha"
    assert f"{next(iter(changes))} is " in error.problem


def test_open_names_an_extra_key(adapter: Path, config: DecoderConfig) -> None:
    extra = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    _change_weights(adapter, lambda tensors: tensors.update({extra: torch.zeros(3, 16)}))
    error = _error(adapter, config)
    assert error.code == "adapter_keys_unexpected"
    assert extra in error.problem
    assert "closest: base_model.model.model.layers." in error.problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_open_names_values_that_are_not_finite(
    adapter: Path, config: DecoderConfig, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.lora_A.weight"][1, 2] = value

    _change_weights(adapter, spoil)
    error = _error(adapter, config)
    assert error.code == "adapter_not_finite"
    assert f"{Q_PROJ}.lora_A.weight" in error.problem


def test_open_refuses_a_rank_that_is_not_that_of_the_tensors(
    adapter: Path, config: DecoderConfig
) -> None:
    _change_config(adapter, r=4)
    error = _error(adapter, config)
    assert error.code == "adapter_rank"
    assert "r is 4, but adapter_model.safetensors was saved with 3" in error.problem
    _change_weights(adapter, lambda _: None)  # as another writer leaves it
    error = _error(adapter, config)
    assert error.code == "adapter_rank"
    assert "lora_A.weight has rank 3; adapter_config.json says 4" in error.problem


def test_open_names_a_tensor_of_another_shape(adapter: Path, config: DecoderConfig) -> None:
    name = f"{Q_PROJ}.lora_B.weight"
    _change_weights(adapter, lambda tensors: tensors.update({name: torch.zeros(15, 3)}))
    error = _error(adapter, config)
    assert error.code == "adapter_shape"
    assert f"{name} has shape [15, 3]; its rank and the base require [16, 3]" in error.problem


def test_open_names_a_truncated_file(adapter: Path, config: DecoderConfig) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    error = _error(adapter, config)
    assert error.code == "artifact_damaged"
    assert str(path) in error.problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; wanted LORA"),
        ({"r": 0}, "r is 0; wanted a number of 1 or more"),
        ({"lora_alpha": None}, "lora_alpha is None; wanted a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"target_modules": None}, "target_modules is .*; wanted a list of names or a pattern"),
        ({"target_modules": [3]}, r"target_modules is \[3\]; wanted a list of names"),
        ({"target_modules": ["q_porj"]}, r"named q_porj \(closest: q_proj\)"),
        ({"target_modules": "q_proj"}, "adapts no module .* the pattern 'q_proj'"),
        ({"target_modules": "q_(proj"}, r"target_modules: 'q_\(proj' is not a valid pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embeddings or lm_head are not supported"),
        ({"target_modules": ".*embed_tokens"}, "embeddings or lm_head are not supported"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules is .*; wanted a list of names"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\]; wanted layer numbers"),
        ({"layers_to_transform": True}, "layers_to_transform is True; wanted layer numbers"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        (
            {"target_modules": ".*q_proj", "layers_to_transform": [0]},
            "layers_to_transform and layers_pattern need a list of names",
        ),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern sets q_proj to 0; wanted a number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern sets q_proj to 1.5"),
        ({"rank_pattern": {"q_(proj": 3}}, r"rank_pattern: 'q_\(proj' is not a valid pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern sets q_proj to '8'"),
        ({"rank_pattern": "x"}, "rank_pattern is 'x'; wanted numbers by module"),
        ({"alpha_pattern": ["a"]}, r"alpha_pattern is \['a'\]; wanted numbers by module"),
        ({"use_rslora": 1}, "use_rslora is 1; wanted true or false"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_open_refuses_an_adapter_that_is_not_plain_lora(
    adapter: Path, config: DecoderConfig, changes: dict[str, Any], message: str
) -> None:
    _change_config(adapter, **changes)
    with pytest.raises(NemotronError, match=message) as caught:
        open_adapter(adapter, config=config)
    assert caught.value.code == "adapter_config"


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"bias": "all"}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_what_only_peft_computes_is_to_be_merged_there(
    adapter: Path, config: DecoderConfig, changes: dict[str, Any]
) -> None:
    _change_config(adapter, **changes)
    with pytest.raises(NemotronError) as caught:
        open_adapter(adapter, config=config)
    assert "merge_and_unload" in caught.value.fix


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_open_says_which_file_is_missing(adapter: Path, config: DecoderConfig, name: str) -> None:
    (adapter / name).unlink()
    error = _error(adapter, config)
    assert error.code == "adapter_missing"
    assert f"has no {name}" in error.problem
