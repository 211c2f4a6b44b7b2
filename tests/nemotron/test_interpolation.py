"""nemotron.interpolation: three references, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron import interpolation
from nemotron.errors import CombinedError, NemotronError
from nemotron.interpolation import escape, resolve
from nemotron.tree import Node, child_at, parse_yaml, plain


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
        ("${oc.env:UNSET,'a=b~c d'}", "a=b~c d"),
        ("image:${oc.env:UNSET,25.10}", "image:25.10"),
        ("${oc.env:UNSET,010}", "010"),
        ("${oc.env:UNSET,'3'}", "3"),
        ("${oc.env:UNSET,3}", 3),
        ("${oc.env:UNSET,[a, 1]}", ["a", 1]),
        ("${oc.env:UNSET,???}", "???"),
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
def test_a_reference_becomes_the_value_that_it_stands_for(
    text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(NemotronError, match="ships with the steps"):
        resolved(f"${{steps:{path}}}")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("${oc.decode:x}", "oc.decode"),
        ("${oc.create:{a: 1}}", "oc.create"),
        ("${oc.env:COLOUR,${oc.decode:x}}", "oc.decode"),
        ("${oc.${steps:.}:COLOUR}", "oc"),
        ("${mul:2,3}", "mul"),
        ("${now:%Y}", "now"),
        ("${oc.env}", "oc.env"),
        ("${oc.env:}", "oc.env"),
        ("${oc.env:A,b,c}", "oc.env"),
        ("${other.key}", "other.key"),
        ("${}", ""),
    ],
)
def test_any_other_reference_is_refused_by_name(
    text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOUR", "green")
    with pytest.raises(NemotronError, match="cannot resolve") as caught:
        resolved(text)
    assert name in caught.value.problem
    assert caught.value.code == "interpolation_invalid"
    assert caught.value.where == "f.yaml:3"
    assert "\\${ for a literal ${" in caught.value.fix


@pytest.mark.parametrize("default", ["~/x", "a=b", "", "[${oc.env:B,b}]"])
def test_a_default_that_must_be_quoted_is_refused(default: str) -> None:
    with pytest.raises(NemotronError, match="cannot resolve") as caught:
        resolved(f"${{oc.env:UNSET_A,{default}}}")
    assert "in quotes" in caught.value.fix


def section(text: str) -> object:
    return plain(resolve(parse_yaml(text, "f.yaml")))


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("${workspace}/x", "/w/x"),
        ("${ workspace }", "/w"),
        ("${run.env.nodes}", 2),
        ("${run.env.tag}", 25.1),
        ("image:${run.env.tag}", "image:25.10"),
        ("n${run.env.nodes}", "n2"),
        ("${run.env.mounts}", ["/w:/w"]),
        ("${run.env.mounts[0]}", "/w:/w"),
        ("${run.env.mounts.0}", "/w:/w"),
        ("${run.env}", {"nodes": 2, "tag": 25.1, "mounts": ["/w:/w"], "same": 2}),
        ("${.beside}", "$HOME and ${HOME}"),
        ("${nothing}", None),
        ("${oc.env:UNSET_A,${workspace}/y}", "/w/y"),
        ("${oc.env:UNSET_A,${run.env.nodes}}", 2),
    ],
)
def test_a_reference_to_another_key_takes_its_value(reference: str, value: object) -> None:
    got = section(
        rf"""
        key: {{under: '{reference}', beside: '$HOME and \${{HOME}}'}}
        """
        """
        nothing: null
        workspace: ${oc.env:UNSET_A,/w}
        run:
          env: {nodes: 2, tag: 25.10, mounts: ['${workspace}:${workspace}'], same: '${.nodes}'}
        """
    )
    assert isinstance(got, dict)
    assert got["key"]["under"] == value


def test_a_reference_to_a_key_keeps_text_and_says_where_it_stands() -> None:
    tree = resolve(parse_yaml("tag: 25.10\nimage: ${tag}\n", "f.yaml"))
    node = child_at(tree, ("image",))
    assert node is not None
    assert (node.text, node.place) == ("25.10", "f.yaml:2 (${tag})")


def test_an_unknown_key_is_named_with_the_closest() -> None:
    with pytest.raises(NemotronError, match=r"no key run\.wrkspace") as caught:
        section("run: {workspace: /w}\na: ${run.wrkspace}/x\n")
    assert caught.value.fix == "did you mean run.workspace?"
    assert caught.value.where == "f.yaml:2"


@pytest.mark.parametrize(
    ("text", "circle"),
    [
        ("a: ${a}", "a -> a"),
        ("{a: 'x${b}', b: '${c}', c: '${a}'}", "a -> b -> c -> a"),
        ("a: {b: '${a}'}", "a.b -> a.b"),
    ],
)
def test_a_circle_of_references_is_named_once(text: str, circle: str) -> None:
    with pytest.raises(NemotronError) as caught:
        section(text)
    assert not isinstance(caught.value, CombinedError)
    assert caught.value.problem.endswith(f"references form a cycle: {circle}")


@pytest.mark.parametrize("kind", ["{x: 1}", "[1]", "null"])
def test_only_a_scalar_may_stand_inside_of_text(kind: str) -> None:
    with pytest.raises(NemotronError, match="a reference inside text resolves to"):
        section(f"a: {kind}\nb: x${{a}}\n")


@pytest.mark.parametrize(
    "value", ["REFERENCE" * 10, "[" + "'REFERENCE'," * 10 + "]"], ids=["text", "list"]
)
def test_references_to_references_cannot_blow_up(value: str) -> None:
    lines = [f"a{i + 1}: {value.replace('REFERENCE', f'${{a{i}}}')}" for i in range(30)]
    with pytest.raises(NemotronError, match="too long for a reference"):
        section("\n".join(["a0: word", *lines]))


def test_a_chain_of_references_that_is_too_long_is_refused() -> None:
    chain = [f"a{i}: ${{a{i + 1}}}" for i in range(1000)]
    with pytest.raises(NemotronError, match="cannot resolve"):
        section("\n".join([*chain, "a1000: word"]))


@pytest.mark.parametrize("text", ["${oc.env:A,", "${oc.env:UNSET_A,${oc.env:B,x}", "${steps:x"])
def test_a_reference_that_is_not_closed_is_refused(text: str) -> None:
    with pytest.raises(NemotronError, match="cannot resolve"):
        resolved(text)


def test_a_null_inside_of_text_is_refused() -> None:
    with pytest.raises(NemotronError, match="resolves to null"):
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


@given(st.text(alphabet=r"\${}ab,:'", max_size=12))
def test_escape_is_undone_by_resolve(text: str) -> None:
    escaped = escape(Node({"key": Node(text)}))
    assert plain(resolve(escaped)) == {"key": text}


@given(st.text(alphabet=r"\${}[].oc.env:steps,'ab3 ", max_size=20))
def test_resolve_raises_only_our_error(text: str) -> None:
    for start in ("${oc.env:", "${", ""):
        try:
            resolved(start + text)
        except NemotronError:
            continue
