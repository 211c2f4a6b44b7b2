"""Contradictions that are found before a merge starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nemotron.config import override, read_config
from nemotron.errors import ExitCode
from nemotron.interpolation import resolve
from nemotron.steps.convert.merge_lora import schema
from nemotron.steps.convert.merge_lora.checks import check
from nemotron.steps.convert.merge_lora.schema import Config
from nemotron.tree import plain

GOOD: dict[str, Any] = {
    "lora_checkpoint": "run",
    "base_megatron_path": "base",
    "output_hf_path": "out/hf",
}


def _codes(**changes: Any) -> list[tuple[str, str]]:
    return [(error.code, error.where) for error in check(Config.model_validate(GOOD | changes))]


def test_a_config_without_contradictions_passes() -> None:
    assert _codes() == []
    assert _codes(hf_model_path="hf") == []
    assert _codes(backend="hf_peft", base_megatron_path=None, base_hf_path="hf") == []
    assert _codes(export_hf=False, output_hf_path=None, output_megatron_path="out/m") == []


def test_auto_takes_the_megatron_base_where_there_is_one() -> None:
    assert Config.model_validate(GOOD).is_megatron_base
    assert not Config.model_validate(
        GOOD | {"base_megatron_path": None, "base_hf_path": "x"}
    ).is_megatron_base


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"base_megatron_path": None}, "base_hf_path"),
        ({"backend": "megatron_bridge", "base_megatron_path": None}, "base_megatron_path"),
        ({"backend": "hf_peft", "base_megatron_path": None}, "base_hf_path"),
        ({"backend": "hf_peft", "base_hf_path": "hf"}, "base_megatron_path"),
        ({"base_hf_path": "hf"}, "base_hf_path"),
        ({"backend": "megatron_bridge", "base_hf_path": "hf"}, "base_hf_path"),
        ({"output_hf_path": None}, "output_hf_path"),
        ({"export_hf": False}, "export_hf"),
    ],
)
def test_paths_that_do_not_fit_the_backend_are_refused(changes: dict[str, Any], where: str) -> None:
    assert _codes(**changes) == [("contradicting_paths", where)]


def test_the_base_of_default_yaml_is_not_merged_where_the_command_line_names_another() -> None:
    shipped = read_config(Path(schema.__file__).parent / "config" / "default.yaml")
    values = plain(resolve(override(shipped, ["base_hf_path=theirs"])))
    del values["run"]
    (error,) = check(Config.model_validate(values))
    assert (error.code, error.where) == ("contradicting_paths", "base_hf_path")
    assert "base_hf_path=theirs would be a second one" in error.problem
    assert "base_megatron_path=null" in error.fix
    assert "hf_model_path=DIR" in error.fix


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"output_hf_path": "run"}, "output_hf_path"),
        ({"output_hf_path": "run/merged"}, "output_hf_path"),
        ({"output_hf_path": "."}, "output_hf_path"),
        ({"output_hf_path": "base/../base/hf"}, "output_hf_path"),
        ({"output_megatron_path": "base/iter_0000001"}, "output_megatron_path"),
        ({"output_megatron_path": "out"}, "output_megatron_path"),
        ({"hf_model_path": "out/hf"}, "output_hf_path"),
    ],
)
def test_outputs_that_overlap_are_refused(changes: dict[str, Any], where: str) -> None:
    assert _codes(**changes) == [("output_path_overlaps_inputs", where)]
    assert check(Config.model_validate(GOOD | changes))[0].exit_code == ExitCode.USAGE


def test_an_overlap_through_a_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    config = Config(
        lora_checkpoint=tmp_path / "run",
        base_megatron_path=tmp_path / "base",
        output_hf_path=tmp_path / "link" / "hf",
    )
    assert [error.code for error in check(config)] == ["output_path_overlaps_inputs"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", "peft"),
        ("tp", 2),
        ("pp", 2),
        ("ep", 8),
        ("cpu", False),
        ("trust_remote_code", True),
        ("safe_serialization", False),
        ("strict", False),
        ("torch_dtype", "float16"),
        ("device_map", "auto"),
        ("hf_model_id", "org/model"),
        ("output_path", "x"),
    ],
)
def test_values_that_mean_nothing_here_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        Config.model_validate(GOOD | {key: value})


def test_checks_import_no_torch() -> None:
    code = "import sys, nemotron.steps.convert.{}.checks; sys.exit('torch' in sys.modules)"
    for step in ("merge_lora", "hf_to_megatron"):
        command = [sys.executable, "-c", code.format(step)]
        assert subprocess.run(command, check=False).returncode == 0
