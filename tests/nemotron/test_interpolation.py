"""nemotron.interpolation: two references, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron import interpolation
from nemotron.errors import NemotronError
from nemotron.interpolation import escape, resolve
from nemotron.tree import Node, child_at, plain

# The same examples in every run; a busy machine is no reason to fail.
fixed = settings(deadline=None, derandomize=True)


def resolved(text: str) -> object:
    return plain(resolve(Node({"key": Node(text, "f.yaml:3", text)})))["key"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:COLOUR}", "green"),
        ("${ oc.env : COLOUR }", "green"),
        ("a/${oc.env:COLOUR}/b", "a/green/b"),
        ("${oc.env:COLOUR,red}", "green"),
        ("${oc.env:UNSET,./out/a_b}", "./out/a_b"),
        ("${oc.env:UNSET,a=b~c d}", "a=b~c d"),
        ("${oc.env:UNSET,docker://a/b:25.10}", "docker://a/b:25.10"),
        ("${oc.env:UNSET,''}", ""),
        ("${oc.env:UNSET,'null'}", "null"),
        ("${oc.env:UNSET,null}", None),
        ("${oc.env:UNSET,${oc.env:COLOUR}/x}", "green/x"),
        ("${oc.env:UNSET,${oc.env:ALSO_UNSET,null}}", None),
        ("${oc.env:COLOUR,${oc.env:UNSET}}", "green"),
        ("${oc.env:EMPTY,red}", "red"),
        (r"\${oc.env:COLOUR}", "${oc.env:COLOUR}"),
        (r"\\${oc.env:COLOUR}", r"\green"),
        ("$PLAIN and {braces}", "$PLAIN and {braces}"),
        ("${oc.env:COUNT}", 32),
    ],
)
def test_references_are_resolved(text: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "green")
    monkeypatch.setenv("COUNT", "32")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    assert resolved(text) == value


def test_a_numeric_default_keeps_its_text() -> None:
    tree = resolve(Node({"tag": Node("${oc.env:UNSET_TAG,25.10}", "f")}))
    node = child_at(tree, ("tag",))
    assert node is not None
    assert node.text == "25.10"


def test_the_place_says_which_variable_gave_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "green")
    tree = resolve(Node({"a": Node("${oc.env:COLOUR}", "f.yaml:1")}))
    node = child_at(tree, ("a",))
    assert node is not None
    assert node.place == "f.yaml:1 ($COLOUR)"


def test_steps_is_an_absolute_path_below_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpolation, "STEPS_ROOT", tmp_path)
    (tmp_path / "_tiny" / "a model").mkdir(parents=True)
    assert resolved("${steps:_tiny/a model}") == str(tmp_path / "_tiny" / "a model")
    assert resolved("${oc.env:UNSET_X,${steps:_tiny}/x}") == f"{tmp_path}/_tiny/x"


@pytest.mark.parametrize("path", ["nope", "../x", "/etc/passwd", ""])
def test_steps_refuses_what_is_not_below_the_steps(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpolation, "STEPS_ROOT", tmp_path)
    (tmp_path.parent / "x").touch()
    with pytest.raises(NemotronError, match="names nothing that ships here"):
        resolved(f"${{steps:{path}}}")


@pytest.mark.parametrize(
    "text", ["${other.key}", "${oc.decode:x}", "${now:%Y}", "${}", "${oc.env}"]
)
def test_any_other_reference_is_refused(text: str) -> None:
    with pytest.raises(NemotronError, match="cannot resolve") as caught:
        resolved(text)
    assert caught.value.code == "interpolation_invalid"
    assert caught.value.where == "f.yaml:3"


@pytest.mark.parametrize("text", ["${oc.env:A,", "${oc.env:UNSET_A,${oc.env:B,x}", "${steps:x"])
def test_a_reference_that_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(NemotronError, match="cannot resolve"):
        resolved(text)


def test_a_null_inside_of_text_is_refused() -> None:
    with pytest.raises(NemotronError, match="came out as null"):
        resolved("${oc.env:UNSET_A,null}/x")


def test_a_missing_variable_names_the_key_and_the_variable() -> None:
    tree = Node(
        {"a": Node({"b": Node("${oc.env:UNSET_A}", "f:1")}), "c": Node("${oc.env:UNSET_B}")}
    )
    with pytest.raises(NemotronError) as caught:
        resolve(tree)
    text = str(caught.value)
    assert "a.b needs the environment variable UNSET_A, which is not set" in text
    assert "c needs the environment variable UNSET_B" in text


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY"])
def test_a_secret_variable_is_refused_and_not_shown(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "hunter2hunter2")
    with pytest.raises(NemotronError, match="secret variable") as caught:
        resolved(f"${{oc.env:{name},''}}")
    assert caught.value.code == "secret_in_config"
    assert f'secrets = ["{name}"]' in caught.value.fix
    assert "hunter2" not in str(caught.value)


@fixed
@given(st.text(alphabet=r"\${}ab,:'", max_size=12))
def test_escape_is_undone_by_resolve(text: str) -> None:
    assert resolved(escape(text)) == text


@fixed
@given(st.text(alphabet=r"\${}oc.env:steps,'ab ", max_size=20))
def test_resolve_raises_only_our_error(text: str) -> None:
    try:
        resolved("${oc.env:" + text)
    except NemotronError:
        return
