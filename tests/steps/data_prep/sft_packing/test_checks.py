"""Checks before the start: all problems at once, none about inputs that are not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemotron.steps.data_prep.sft_packing.checks import check, check_config
from nemotron.steps.data_prep.sft_packing.schema import Config


def config(tmp_path: Path, **values: Any) -> Config:
    settings = {
        "blend_path": "/not/here.jsonl",
        "output_dir": tmp_path / "out",
        "tokenizer": "/not/here",
    }
    return Config.model_validate(settings | values)


def codes(tmp_path: Path, **values: Any) -> list[str]:
    return [error.code for error in check(config(tmp_path, **values))]


def test_check_says_nothing_about_inputs_that_are_not_here(tmp_path: Path) -> None:
    assert codes(tmp_path) == []
    assert codes(tmp_path, chat_template="/not/here.jinja") == []


def test_check_reports_every_problem(tmp_path: Path) -> None:
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"dataset": []}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4095}))
    found = codes(tmp_path, blend_path=str(blend), tokenizer=str(tmp_path), chat_template="nan3")
    assert found == ["bad_blend", "bad_chat_template", "seq_length_mismatch"]


def test_what_is_wrong_in_a_config_alone_is_found_without_its_files(tmp_path: Path) -> None:
    blend = tmp_path / "blend.json"
    blend.write_text(json.dumps({"dataset": []}))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8}))
    asked = config(tmp_path, blend_path=str(blend), tokenizer=str(tmp_path), output_dir="/else")
    assert check_config(asked) == []
    asked = config(tmp_path, blend_path=str(tmp_path / "out" / "x"), chat_template="nan3")
    found = [error.code for error in check_config(asked)]
    assert found == ["output_path_overlaps_inputs", "bad_chat_template"]


def test_check_lets_short_documents_into_long_packs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    output = tmp_path.parent / "out"
    assert codes(tmp_path, tokenizer=str(tmp_path), output_dir=output) == ["seq_length_mismatch"]
    assert codes(tmp_path, tokenizer=str(tmp_path), output_dir=output, max_doc_tokens=2049) == []


def test_check_refuses_an_output_inside_its_input(tmp_path: Path) -> None:
    assert codes(tmp_path, blend_path=str(tmp_path)) == ["output_path_overlaps_inputs"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "chat.jsonl").touch()
    inside = codes(tmp_path, blend_path=str(tmp_path / "**" / "*.jsonl"))
    assert inside == ["output_path_overlaps_inputs"]


def test_schema_and_checks_import_nothing_heavy() -> None:
    code = (
        "import sys, nemotron.steps.data_prep.sft_packing.checks;"
        "heavy = {'torch', 'numpy', 'pyarrow', 'tokenizers', 'jinja2', 'huggingface_hub'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
