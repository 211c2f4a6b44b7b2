"""nemotron.validation: errors that name the key, the place and a fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nemotron.errors import NemotronError
from nemotron.tree import Node, parse_yaml
from nemotron.validation import closest, did_you_mean, refuse_secrets, schema_keys, validate


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Strict):
    target: str | None = Field(default=None, alias="_target_")
    seq_length: int = 8
    lr: float = 0.1


class Tokenizer(Strict):
    model: str


class Config(Strict):
    recipe: Recipe = Recipe()
    tokenizer: Tokenizer | str = "bpe"
    name: str | None = None
    out: Path = Path("x")
    code: str = Field(default="1", pattern="^[0-9]+$")
    force: bool = False
    kind: Literal["lora", "010"] = "lora"
    names: list[str] = []
    options: dict[str, Any] = {}
    size: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if self.size == 99:
            raise ValueError("size 99 is odd")
        return self


class Needy(Strict):
    path: str


def parsed(text: str) -> Node:
    return parse_yaml(text, "f.yaml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("name: 010", "name", "010"),
        ("name: no", "name", "no"),
        ("name: 1.50", "name", "1.50"),
        ("name: true", "name", "true"),
        ("name: null", "name", None),
        ("out: 1.50", "out", Path("1.50")),
        ("kind: 010", "kind", "010"),
        ("names: [no, 010, 7]", "names", ["no", "010", "7"]),
        ("size: 010", "size", 10),
        ("size: '3'", "size", 3),
        ("size: 1e3", "size", 1000),
        ("force: no", "force", False),
        ("tokenizer: 007", "tokenizer", "007"),
        ("options: {a: true, b: 1.5}", "options", {"a": True, "b": 1.5}),
    ],
)
def test_values_are_typed_by_the_schema(text: str, key: str, value: object) -> None:
    assert getattr(validate(parsed(text), Config), key) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("size: many", "size is 'many'; wanted an integer"),
        ("size: 0", "size is 0; wanted greater than or equal to 1"),
        ("size: true", "size is true; wanted a number"),
        ("recipe: {lr: no}", "recipe.lr is 'no'; wanted a number"),
        ("recipe: 5", "recipe is 5; wanted a section of keys"),
        ("name: {a: 1}", "name is a section with the keys a; wanted a string"),
        ("names: x", "names is 'x'; wanted a list, such as [a,b]"),
        ("kind: dora", "kind is 'dora'; wanted 'lora' or '010'"),
        ("force: maybe", "force is 'maybe'; wanted true or false"),
        ("size: 99", "size 99 is odd"),
        ("code: x", "code is 'x'; wanted text that fits the pattern '^[0-9]+$'"),
        ("out: null", "out is null; wanted a path"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_was_wanted(text: str, problem: str) -> None:
    with pytest.raises(NemotronError) as caught:
        validate(parsed(text), Config, source="f.yaml")
    assert caught.value.code == "invalid_value"
    assert problem in caught.value.problem
    assert caught.value.where.startswith("f.yaml")


def test_all_errors_are_reported_at_once_with_their_lines() -> None:
    with pytest.raises(NemotronError) as caught:
        validate(parsed("size: x\nrecipe:\n  seq_len: 3\n  lr: y\n"), Config)
    assert str(caught.value).count("error[") == 3
    assert "f.yaml:1" in str(caught.value)
    assert "f.yaml:3" in str(caught.value)


def test_a_union_gives_one_error() -> None:
    with pytest.raises(NemotronError) as caught:
        validate(parsed("tokenizer: [1]"), Config)
    assert str(caught.value).count("error[") == 1


def test_a_missing_key_is_named_with_the_file() -> None:
    with pytest.raises(NemotronError, match="path is not set") as caught:
        validate(Node({}), Needy, source="f.yaml")
    assert caught.value.where == "f.yaml"
    assert caught.value.fix.startswith("pass path=")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("recipe: {seq_lenght: 1}", "did you mean recipe.seq_length?"),
        ("seq_length: 1", "did you mean recipe.seq_length?"),
        ("recipe: {zzz: 1}", "recipe has: recipe._target_, recipe.seq_length, recipe.lr"),
        ("qqqq: 1", "the keys are: recipe, tokenizer"),
    ],
)
def test_an_unknown_key_comes_with_the_closest_names(text: str, fix: str) -> None:
    with pytest.raises(NemotronError) as caught:
        validate(parsed(text), Config)
    assert caught.value.code == "unknown_key"
    assert caught.value.fix.startswith(fix)
    assert caught.value.where == "f.yaml:1"


def test_keys_are_named_with_the_prefix_of_the_section() -> None:
    with pytest.raises(NemotronError, match=r"unknown key run\.env\.siz") as caught:
        validate(parsed("siz: 1"), Config, prefix=("run", "env"))
    assert caught.value.fix == "did you mean run.env.size?"


def test_schema_keys_lists_sections_aliases_and_branches_of_unions() -> None:
    keys = schema_keys(Config)
    assert {"recipe", "recipe._target_", "recipe.lr", "tokenizer.model", "size"} <= set(keys)
    assert "recipe.target" not in keys


def test_closest_prefers_the_same_last_word() -> None:
    known = ["train.iters", "model.seq_length", "recipe.seq_length", "train.seq_len"]
    assert closest("seq_length", known)[:2] == ["model.seq_length", "recipe.seq_length"]
    assert closest("zzz", known) == []
    assert did_you_mean("zzz", known, "look") == "look"


def test_a_long_value_is_cut_and_a_secret_value_is_hidden() -> None:
    with pytest.raises(NemotronError) as caught:
        validate(parsed(f"size: {'x' * 500}"), Config)
    assert len(caught.value.problem) < 150
    with pytest.raises(NemotronError) as caught:
        validate(parsed(f"size: hf_{'x' * 30}"), Config)
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"a: {{b: hf_{'x' * 30}}}",
        f"list: [1, AKIA{'A' * 16}]",
        f"wandb_api_key: {'0' * 40}",
        "db_password: tiger",
        "url: https://u:p@h/x",
    ],
)
def test_refuse_secrets_names_the_key_and_never_the_value(text: str) -> None:
    with pytest.raises(NemotronError, match="looks like a credential") as caught:
        refuse_secrets(parsed(text))
    assert caught.value.where == "f.yaml:1"
    assert not any(part in str(caught.value) for part in ("xxx", "AAAA", "0000", "tiger", "u:p"))


def test_refuse_secrets_leaves_tokenizers_and_empty_values_alone() -> None:
    refuse_secrets(
        parsed(f"tokenizer: {{model: m}}\npad_token: <pad>\nHF_TOKEN: ''\nsha: {'0' * 40}")
    )
