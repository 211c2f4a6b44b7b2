"""nemotron.config: chains, arguments, and the file that crosses to the job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from nemotron.config import Schema, dump, load_config, override, read_config
from nemotron.errors import NemotronError
from nemotron.interpolation import STEPS_ROOT, resolve
from nemotron.tree import Node, child_at, from_plain, leaves, parse_yaml, plain
from nemotron.validation import refuse_secrets


class Peft(Schema):
    dim: int = 32
    alpha: float = 32.0


class Config(Schema):
    peft: Peft = Peft()
    name: str | None = None
    names: tuple[str, ...] = ()
    options: dict[str, Any] = Field(default={})


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.yaml").write_text(text)
    return directory / f"{next(iter(files))}.yaml"


def test_load_config_returns_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path, a="peft: {dim: 8}\nname: 010\n")
    assert load_config(path, Config) == Config(peft=Peft(dim=8), name="010")


def test_load_config_names_file_and_line_of_an_unknown_key(here: Path) -> None:
    write(here, a="peft:\n  dim: 8\n  alhpa: 3\n")
    with pytest.raises(NemotronError) as caught:
        load_config(Path("a.yaml"), Config)
    assert str(caught.value).splitlines() == [
        "error[unknown_key]: unknown key peft.alhpa",
        "  where: a.yaml:3",
        "  fix: did you mean peft.alpha?",
    ]


def test_load_config_refuses_a_credential(tmp_path: Path) -> None:
    path = write(tmp_path, a=f"name: hf_{'x' * 30}\n")
    with pytest.raises(NemotronError, match="credential"):
        load_config(path, Config)


def test_defaults_are_laid_in_order_and_the_file_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="defaults: [one, two.yaml]\npeft: {dim: 3}\n",
        one="defaults: base\npeft: {dim: 1, alpha: 1}\nname: one\n",
        two="name: two\nnames: [c]\n",
        base="peft: {dim: 0}\nnames: [a, b]\n",
    )
    tree = read_config(path)
    assert plain(tree) == {"peft": {"dim": 3, "alpha": 1}, "names": ["c"], "name": "two"}
    node = child_at(tree, ("peft", "dim"))
    assert node is not None
    assert node.place.endswith("top.yaml:2")
    assert node.overrides.endswith("one.yaml:2")


def test_defaults_may_name_files_in_other_directories(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="name: base\n")
    path = write(tmp_path / "sub", top="defaults: ../base\n")
    assert plain(read_config(path)) == {"name": "base"}


def test_defaults_may_name_a_config_that_ships_with_the_steps(tmp_path: Path) -> None:
    tiny = "peft/megatron_bridge/config/tiny.yaml"
    path = write(tmp_path, top=f"defaults: ${{steps:{tiny}}}\npeft: {{dim: 3}}\n")
    composed, shipped = plain(read_config(path)), plain(read_config(STEPS_ROOT / tiny))
    assert composed == shipped | {"peft": shipped["peft"] | {"dim": 3}}


def test_a_reference_of_defaults_that_names_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, top="defaults: [base, '${steps:nope.yaml}']\n", base="{}\n")
    with pytest.raises(NemotronError, match=r"no file 'nope.yaml' ships with the steps") as caught:
        read_config(path)
    assert caught.value.where.endswith("top.yaml:1")


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    same = "defaults: c\n"
    path = write(tmp_path, top="defaults: [a, b]\n", a=same, b=same, c="x: 1\n")
    assert plain(read_config(path)) == {"x": 1}


def test_a_circle_of_defaults_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a="defaults: b\n", b="x: 1\ndefaults: a\n")
    with pytest.raises(NemotronError, match=r"a\.yaml -> b\.yaml -> a\.yaml") as caught:
        read_config(path)
    assert caught.value.code == "defaults_cycle"
    assert caught.value.where.endswith("b.yaml:2")


def test_a_missing_base_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path, a="defaults: bse\n", base="{}\n")
    with pytest.raises(NemotronError, match="'bse'") as caught:
        read_config(path)
    assert caught.value.code == "defaults_missing"
    assert caught.value.where.endswith("a.yaml:1")
    assert "base.yaml" in caught.value.fix


@pytest.mark.parametrize("shape", ["{a: b}", "[{x: y}]", "5", "[a, 1]", "''"])
def test_any_other_shape_of_defaults_is_refused(tmp_path: Path, shape: str) -> None:
    path = write(tmp_path, a=f"defaults: {shape}\n")
    with pytest.raises(NemotronError) as caught:
        read_config(path)
    assert caught.value.code == "defaults_invalid"


def overridden(*arguments: str, base: str = "{}") -> Any:
    return plain(override(parse_yaml(base, "f.yaml"), arguments))


def test_an_argument_splits_at_the_first_equals_sign() -> None:
    assert overridden("a.b=x=y=z") == {"a": {"b": "x=y=z"}}


def test_later_arguments_win_and_sections_are_kept() -> None:
    got = overridden("a.b=1", "a.c=2", "a.b=3", base="a: {d: 4}")
    assert got == {"a": {"b": 3, "c": 2, "d": 4}}


def test_null_lists_and_sections_are_values() -> None:
    got = overridden("a=null", "b=[x, 1]", "c={d: 2}", base="{a: {z: 1}, b: [0], c: {e: 3}}")
    assert got == {"a": None, "b": ["x", 1], "c": {"d": 2, "e": 3}}


def test_a_key_may_go_below_null() -> None:
    assert overridden("a.b=1", base="a: null") == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("argument", "kind"),
    [("a.b=1", "a single value"), ("c.d.e=1", "a list"), ("c.d.0=1", "a list")],
)
def test_a_key_below_a_value_is_refused(argument: str, kind: str) -> None:
    with pytest.raises(NemotronError, match=kind) as caught:
        overridden(argument, base="{a: 5, c: {d: [1]}}")
    assert caught.value.code == "not_a_section"
    assert caught.value.where == f"argument {argument}"


@pytest.mark.parametrize("argument", ["word", "=3", ".a=3", "a.=3", "a b=3", "https://h/x?y=z", ""])
def test_what_is_not_key_equals_value_is_refused(argument: str) -> None:
    with pytest.raises(NemotronError, match=r"is not key=value") as caught:
        overridden(argument)
    assert caught.value.code == "argument_invalid"


def test_the_place_of_an_argument_hides_a_secret() -> None:
    tree = override(Node({}), [f"a=hf_{'x' * 30}", "wandb.api_key=tiger"])
    places = " ".join(node.place for _, node in leaves(tree))
    assert "xxx" not in places
    assert "tiger" not in places


@pytest.mark.parametrize("value", ["{HF_TOKEN: hunter2}", " [{password: hunter2}]", "{a: hunter2"])
@pytest.mark.parametrize("key", ["run.env.env_vars", "no key"])
def test_what_a_section_or_list_holds_is_named_by_its_key_alone(key: str, value: str) -> None:
    with pytest.raises(NemotronError) as caught:
        refuse_secrets(override(Node({}), [f"{key}={value}", "password=x"]))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", ["{HF_TOKEN: hunter2}", " [{password: hunter2}]"])
def test_an_argument_that_is_no_key_is_shown_without_the_section_behind_it(value: str) -> None:
    with pytest.raises(NemotronError) as caught:
        override(Node({}), [f"no key={value}"])
    assert "'no key=...' is not key=value" in str(caught.value)


def test_a_scalar_in_place_of_a_section_is_refused_by_the_schema(tmp_path: Path) -> None:
    path = write(tmp_path, a="peft: 5\n")
    with pytest.raises(NemotronError, match="peft is 5; wanted a section of keys"):
        load_config(path, Config)


keys = st.from_regex(r"[a-z_][a-z0-9_-]{0,5}(\.[a-z0-9_]{1,5}){0,2}", fullmatch=True)


@given(st.lists(st.text(max_size=20), max_size=4))
def test_override_raises_only_our_error(arguments: list[str]) -> None:
    try:
        override(Node({}), arguments)
    except NemotronError:
        return


@given(keys, st.text(max_size=20))
def test_the_text_of_an_argument_is_kept(key: str, text: str) -> None:
    node = child_at(override(Node({}), [f"{key}={text}"]), tuple(key.split(".")))
    assert node is not None
    if text.strip()[:1] not in ("[", "{", "'", '"'):
        assert node.text == text


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
    | st.text("\x85\u2028\u2029\r\n\t \x00\x1b'a:", max_size=6)
    | st.sampled_from(
        ["no", "010", "1e-4", "${oc.env:HOME}", "12:30", "~", "null", "- a", "#", "0o7"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values)
def test_what_dump_writes_load_config_reads_back(value: Any) -> None:
    # Without the file in between, which would cost a disk write per example.
    tree = parse_yaml(dump({"options": {"value": value}}), "f.yaml")
    assert plain(resolve(tree)) == {"options": {"value": value}}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("${steps:_tiny/model}", "HERE/_tiny/model"),
        (r"\${steps:_tiny/model}", "${steps:_tiny/model}"),
        (r"\\${steps:_tiny}/\${HOME}", r"\HERE/_tiny/${HOME}"),
        (r"\\\${steps:_tiny}", r"\${steps:_tiny}"),
        ("${name}/${name}", "HERE/_tiny/HERE/_tiny"),
        (r"${literal}/${name}", "${steps:x}/HERE/_tiny"),
    ],
)
def test_a_remote_job_reads_what_was_meant(written: str, meant: str) -> None:
    values = {"a": written, "name": "${steps:_tiny}", "literal": r"\${steps:x}"}
    kept = plain(resolve(from_plain(values, ""), keep_steps=True))
    assert str(STEPS_ROOT) not in str(kept)
    read = plain(resolve(parse_yaml(dump(kept, keep_steps=True), "f.yaml")))
    assert read["a"] == meant.replace("HERE", str(STEPS_ROOT))


def test_dump_keeps_infinity_and_long_text(tmp_path: Path) -> None:
    text = "word " * 200 + "\n\tand a second line\n"
    (tmp_path / "a.yaml").write_text(dump({"options": {"x": math.inf, "y": text}}))
    config = load_config(tmp_path / "a.yaml", Config)
    assert config.options == {"x": math.inf, "y": text}
