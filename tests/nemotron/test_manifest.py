"""nemotron.manifest: every field of a step.toml is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron.errors import ExitCode, NemotronError
from nemotron.manifest import read_manifest

GOOD = """
[step]
id = "demo/make"
name = "Make"
category = "demo"
description = "Makes."
launch = "python"

[[consumes]]
type = "training_jsonl"
keys = ["source"]
missing = "no_source"

[[errors]]
name = "no_source"
cause = "nothing there"
recovery = "put it there"
exit_code = 3

[reference]
docs = "docs/x.md"
"""

SECOND_ERROR = """
[[errors]]
name = "no_source"
cause = "again"
recovery = "again"
exit_code = 3
"""


def read(directory: Path, text: str) -> object:
    (directory / "step.toml").write_text(text)
    return read_manifest(directory / "step.toml")


def test_a_manifest_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "step.toml").write_text(GOOD)
    manifest = read_manifest(tmp_path / "step.toml")
    assert manifest.step.nodes == 1
    assert manifest.step.gpus_per_node == 0
    assert manifest.consumes[0].required
    assert manifest.produces == ()


def test_an_error_of_the_manifest_carries_cause_recovery_and_exit_code(tmp_path: Path) -> None:
    (tmp_path / "step.toml").write_text(GOOD)
    manifest = read_manifest(tmp_path / "step.toml")
    error = manifest.error("no_source", "source is empty", where="source")
    assert error is not None
    assert (error.why, error.fix) == ("nothing there", "put it there")
    assert error.exit_code is ExitCode.PREFLIGHT
    assert manifest.error("unheard_of", "x") is None


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ('launch = "python"', 'launch = "mpirun"', "step.launch is 'mpirun'"),
        ('launch = "python"', "", "step.launch is not set"),
        ('launch = "python"', 'launch = "python"\ngpu = 1', "unknown manifest key step.gpu"),
        ('id = "demo/make"', 'id = "other/make"', "is not demo/<name>"),
        ('id = "demo/make"', 'id = "demo/Make-It"', "is not demo/<name>"),
        (
            'type = "training_jsonl"',
            'type = "training_json"',
            "'training_json' is not in types.toml",
        ),
        ('missing = "no_source"', 'missing = "no_sauce"', "missing = 'no_sauce' is not one of"),
        ("exit_code = 3", "exit_code = 42", "errors[0].exit_code is 42"),
        ("[reference]", f"{SECOND_ERROR}[reference]", "have the same name"),
        ("[step]", "[stpe]", "unknown manifest key stpe"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(
    here: Path, before: str, after: str, problem: str
) -> None:
    with pytest.raises(NemotronError) as caught:
        read(here, GOOD.replace(before, after))
    assert problem in str(caught.value)
    assert "where: step.toml" in str(caught.value)


def test_a_file_that_is_not_toml_is_named_with_the_line(here: Path) -> None:
    with pytest.raises(NemotronError, match="line 2") as caught:
        read(here, "\n[step\n")
    assert caught.value.code == "manifest_invalid"
