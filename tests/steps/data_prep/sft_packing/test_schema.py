"""The config: upstream's keys, values that are refused, and what is derived."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nemotron.config import load_config
from nemotron.errors import ExitCode
from nemotron.steps import data_prep
from nemotron.steps.data_prep.sft_packing.schema import Config

STEP_ROOT = Path(str(data_prep.__file__)).parent / "sft_packing"


def config(**values: Any) -> Config:
    return Config.model_validate({"blend_path": "a", "output_dir": "b", "tokenizer": "c"} | values)


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_shipped_configs_validate_without_any_environment_variable(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (STEP_ROOT / "config" / f"{name}.yaml").read_text()
    path = tmp_path / "train.yaml"
    path.write_text(text[text.index("blend_path:") :])  # the section run: is the launcher's
    monkeypatch.delenv("SFT_OUTPUT_DIR", raising=False)
    shipped = load_config(path, Config)
    assert shipped.output_dir == Path(f"output/data_prep/sft_packing/{name}")
    monkeypatch.setenv("SFT_OUTPUT_DIR", "/elsewhere")
    assert load_config(path, Config).output_dir == Path("/elsewhere")


def test_manifest_parameters_are_keys_of_the_config_with_its_defaults() -> None:
    manifest = tomllib.loads((STEP_ROOT / "step.toml").read_text())
    shipped = yaml.safe_load((STEP_ROOT / "config" / "default.yaml").read_text())
    for parameter in manifest["parameters"]:
        assert parameter["name"] in Config.model_fields
        value = shipped[parameter["name"]]
        assert parameter["default"] == (
            value if parameter["name"] != "tokenizer" else value["model"]
        )
    for entry in manifest["errors"]:
        assert entry["cause"]
        assert entry["recovery"]
        assert ExitCode(entry["exit_code"])


def test_upstream_keys_of_the_tiny_config_are_accepted() -> None:
    config(
        tokenizer={"model": "m", "add_bos": False, "add_eos": True},
        plan={"planner_cpus": 0.5},
        download={"batch_size": 1, "max_retries": 3, "timeout_sec": 300},
        tokenization={"cpus_per_worker": 1},
        observability={"pipeline_logging_interval_s": 5, "wandb_log_pipeline_stats": True},
        max_rows=1000,
        used_in_filter=None,
    )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pack_sizes": 4}, "pack_sizes"),
        ({"tokenizer": {"model": "m", "trust_remote_code": True}}, "trust_remote_code"),
        ({"dtype": "int64"}, "dtype"),
        ({"execution_mode": "streaming"}, "execution_mode"),
        ({"algorithm": "knapsack"}, "algorithm"),
        ({"sample": 4}, "sample"),
        ({"sample": "4"}, "sample"),
        ({"train_ratio": 0.9}, "train_ratio \\+ valid_ratio \\+ test_ratio is 0.92; must be 1"),
        ({"num_shards": 4, "valid_shards": 2, "test_shards": 2}, "leave no shard"),
        ({"seed": -1}, "seed"),
        ({"sample_seed": -1}, "seed"),
    ],
)
def test_config_refuses_what_the_step_does_not_do(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config(**values)


def test_explicit_shards_beat_the_ratios() -> None:
    shards = config(num_shards=10, valid_shards=2, test_shards=1)
    assert shards.split_shards == {"train": 7, "valid": 2, "test": 1}
    assert shards.split_ratios == {"train": 0.7, "valid": 0.2, "test": 0.1}
    assert config().split_ratios == {"train": 0.98, "valid": 0.01, "test": 0.01}


def test_seed_and_longest_document_follow_from_other_keys() -> None:
    assert config(sample_seed=3).packing_seed == 3
    assert config(sample_seed=3, seed=0).packing_seed == 0
    assert config(pack_size=8).max_stored_tokens == 9
    assert config(pack_size=8, max_doc_tokens=4).max_stored_tokens == 4
