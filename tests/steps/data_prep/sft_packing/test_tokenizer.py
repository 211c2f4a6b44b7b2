"""Loading a tokenizer: from a directory or the Hugging Face cache, with clear refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from nemotron.errors import NemotronError
from nemotron.steps._formats.huggingface import read_chat_template
from nemotron.steps.data_prep.sft_packing.templates import read_template
from nemotron.steps.data_prep.sft_packing.tokenizer import load_tokenizer, template_text
from nemotron.steps.data_prep.sft_packing.tokenizing import EncoderSettings, encoder_of


@pytest.fixture
def copy(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "copy"))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_tokenizer_reads_ids_and_special_tokens(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert tokenizer.vocab_size == 320
    assert ("eos_token", "<|im_end|>") in tokenizer.variables.items()
    assert "<|im_start|>" in tokenizer.special_tokens


def test_a_template_file_beats_the_one_in_the_config(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(str(copy)).chat_template == "{{ messages }}"


def test_load_tokenizer_finds_a_repository_in_the_cache(
    tmp_path: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--model"
    shutil.copytree(copy, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_tokenizer("someone/model").blake3 == load_tokenizer(str(copy)).blake3
    with pytest.raises(NemotronError, match="no tokenizer at someone/other") as caught:
        load_tokenizer("someone/other")
    assert caught.value.code == "missing_tokenizer"
    with pytest.raises(NemotronError, match=r"no tokenizer at \.\./model: no such directory"):
        load_tokenizer("../model")


def test_load_tokenizer_names_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NemotronError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.code == "missing_tokenizer"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"eos_token": "<|end|>"}, r"eos_token '<\|end\|>' is not in tokenizer.json"),
        ({"eos_token": None}, "has no eos_token"),
    ],
)
def test_load_tokenizer_refuses_special_tokens_that_do_not_fit(
    copy: Path, changes: dict[str, Any], problem: str
) -> None:
    change_config(copy, **changes)
    with pytest.raises(NemotronError, match=problem) as caught:
        load_tokenizer(str(copy))
    assert caught.value.code == "tokenizer_mismatch"


def test_load_tokenizer_refuses_ids_without_an_embedding(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"vocab_size": 319}))
    with pytest.raises(NemotronError, match="up to 319, but the model has 319") as caught:
        load_tokenizer(str(copy))
    assert caught.value.code == "tokenizer_mismatch"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_changes_during_a_run_ends_it(copy: Path, name: str) -> None:
    planned = load_tokenizer(str(copy))
    settings = EncoderSettings(
        tokenizer=str(copy),
        tokenizer_blake3=planned.blake3,
        special_tokens=tuple(planned.variables.items()),
        chat_template=read_template("chatml"),
        add_bos=False,
        add_eos=False,
        reasoning="keep",
        sanitize=False,
        engine="tokenizers",
        today=None,
    )
    encoder_of(settings, planned)
    if name == "tokenizer.json":
        (copy / name).write_text((copy / name).read_text() + "\n")
    else:
        change_config(copy, **{"bos_token": "<|im_start|>"})
    with pytest.raises(NemotronError, match="it changed during the run") as caught:
        encoder_of(replace(settings, sanitize=True))  # as another process asks for it anew
    assert caught.value.code == "tokenizer_mismatch"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_load_tokenizer_refuses_a_damaged_file(copy: Path, name: str) -> None:
    (copy / name).write_text("{")
    with pytest.raises(NemotronError) as caught:
        load_tokenizer(str(copy))
    assert (caught.value.code, caught.value.where) == ("tokenizer_mismatch", str(copy / name))


def test_of_several_templates_the_default_is_the_tokenizers_own(copy: Path) -> None:
    templates = [{"name": "tool_use", "template": "{{ x }}"}]
    templates += [{"name": "default", "template": "{{ y }}"}]
    change_config(copy, chat_template=templates)
    assert template_text(None, load_tokenizer(str(copy))) == read_chat_template(copy) == "{{ y }}"
    change_config(copy, chat_template=templates[:1])
    tokenizer = load_tokenizer(str(copy))
    assert template_text("chatml", tokenizer) == read_template("chatml")
    with pytest.raises(NemotronError, match="or several but none named default") as caught:
        template_text(None, tokenizer)
    assert caught.value.code == "bad_chat_template"


def test_template_text_takes_name_text_file_or_the_tokenizers_own(
    copy: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(copy))
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    assert template_text(None, tokenizer) == tokenizer.chat_template
    assert template_text("nano3", tokenizer) == read_template("nano3")
    assert template_text("{{ x }}", tokenizer) == "{{ x }}"
    assert template_text(str(file), tokenizer) == "{{ messages }}"


def test_template_text_refuses_null_where_the_tokenizer_has_none(copy: Path) -> None:
    change_config(copy, chat_template=None)
    with pytest.raises(NemotronError, match="no chat template of its own") as caught:
        template_text(None, load_tokenizer(str(copy)))
    assert caught.value.code == "bad_chat_template"


@pytest.mark.parametrize(
    ("content", "problem"), [(b"just text", "contains no"), (b"\xff{{", "not UTF-8")]
)
def test_read_template_refuses_a_file_that_is_no_template(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(content)
    with pytest.raises(NemotronError, match=problem):
        read_template(str(path))
    with pytest.raises(NemotronError, match="did you mean nano3"):
        read_template("nano")
