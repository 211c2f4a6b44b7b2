"""nemotron.tree: YAML with places, and values as they were typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.errors import NemotronError
from nemotron.tree import (
    Node,
    child_at,
    dotted,
    from_plain,
    leaves,
    merge,
    parse_value,
    parse_yaml,
    plain,
    read_yaml,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        ("0x10", 16),
        ("-3", -3),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("~", None),
        ("'5'", "5"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert plain(parse_yaml(f"a: {text}", "f")) == {"a": value}


def test_every_value_knows_its_line_and_its_text() -> None:
    tree = parse_yaml("a: 1.50\nb:\n  - x\n  - 010\nc: {d: no}\n", "f.yaml")
    found = {dotted(path): (node.place, node.text) for path, node in leaves(tree)}
    assert found == {
        "a": ("f.yaml:1", "1.50"),
        "b[0]": ("f.yaml:3", "x"),
        "b[1]": ("f.yaml:4", "010"),
        "c.d": ("f.yaml:5", "no"),
    }
    section = child_at(tree, ("c",))
    assert section is not None
    assert section.place == "f.yaml:5"


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("a: &x 1\nb: *x\n", "anchors and aliases", 1),
        ("a: 1\nb: [\n", "flow node", 3),
        ("a: 1\na: 2\n", "appears twice", 2),
        ("a: !!python/name:os.system\n", "tags are not supported", 1),
        ("1: [a]\n? [x]\n: 2\n", "a key must be a word", 2),
        ("a: 1\n---\nb: 2\n", "a single document", 2),
        ("a: b: c\n", "mapping values", 1),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, problem: str, line: int) -> None:
    with pytest.raises(NemotronError, match=problem) as caught:
        parse_yaml(text, "f.yaml")
    assert caught.value.code == "yaml_invalid"
    assert caught.value.where == f"f.yaml:{line}"


def test_read_yaml_names_a_file_that_is_missing_unreadable_or_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(NemotronError, match="no file") as missing:
        read_yaml(tmp_path / "x.yaml")
    assert missing.value.code == "config_missing"
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(NemotronError, match="cannot read"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("- a\n")
    with pytest.raises(NemotronError, match="holds a list; wanted a mapping"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert plain(read_yaml(tmp_path / "x.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[a, 2, {b: no}]", ["a", 2, {"b": "no"}]),
        ("{a: [1]}", {"a": [1]}),
        ("[1", "[1"),
        ("[*x]", "[*x]"),
        ("'a b'", "a b"),
        ("a: b", "a: b"),
        ("a # b", "a # b"),
        ("- x", "- x"),
        ("&x", "&x"),
        ("!!int 3", "!!int 3"),
        ("", None),
        (" 5", 5),
    ],
)
def test_parse_value_takes_scalars_and_flow_and_keeps_the_rest_as_text(
    text: str, value: object
) -> None:
    node = parse_value(text, "argument")
    assert plain(node) == value


def test_merge_lays_sections_and_replaces_all_else() -> None:
    base = parse_yaml("a: {x: 1, y: [1, 2]}\nb: 3\n", "base")
    over = parse_yaml("a: {y: [9]}\nb: {z: 1}\nc: 4\n", "over")
    merged = merge(base, over)
    assert plain(merged) == {"a": {"x": 1, "y": [9]}, "b": {"z": 1}, "c": 4}
    replaced = child_at(merged, ("a", "y"))
    assert replaced is not None
    assert replaced.overrides == "base:1"


def test_from_plain_gives_every_value_the_same_place() -> None:
    tree = from_plain({"a": [1, {"b": True}]}, "here")
    assert {node.place for _, node in leaves(tree)} == {"here"}
    assert plain(tree) == {"a": [1, {"b": True}]}


@given(st.text())
def test_parse_value_never_raises_and_keeps_text_that_is_no_value(text: str) -> None:
    node = parse_value(text, "argument")
    assert isinstance(node, Node)
    if isinstance(node.value, str) and text.strip()[:1] not in ("'", '"'):
        assert node.value == text
