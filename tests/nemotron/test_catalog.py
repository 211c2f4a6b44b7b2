"""nemotron.catalog: finding steps and configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import nemotron
from nemotron import catalog
from nemotron.catalog import config_names, find_config, find_step, find_steps, select, steps_root
from nemotron.errors import NemotronError


def ids(steps: list[catalog.Step]) -> list[str]:
    return [step.id for step in steps]


def test_find_steps_returns_every_step_and_no_shared_code(demo_root: Path) -> None:
    found = ["demo/loop", "demo/make", "demo/train", "demo/use", "other/use"]
    assert ids(find_steps(demo_root)) == found


def test_find_steps_refuses_an_id_that_is_not_the_directory(
    tmp_path: Path, demo_root: Path
) -> None:
    step = tmp_path / "demo" / "made"
    step.mkdir(parents=True)
    (step / "step.toml").write_text((demo_root / "demo/make/step.toml").read_text())
    with pytest.raises(NemotronError, match="its directory is 'demo/made'") as caught:
        find_steps(tmp_path)
    assert caught.value.code == "step_misplaced"


def test_steps_root_is_the_linked_directory_of_the_checkout() -> None:
    link = Path(nemotron.__file__).parent / "steps"
    assert steps_root() == link
    # An installed wheel holds the directory itself.
    assert not link.is_symlink() or link.readlink() == Path("../../steps")


def test_no_module_is_imported_as_top_level_steps() -> None:
    assert not [name for name in sys.modules if name == "steps" or name.startswith("steps.")]


def test_a_clone_without_links_is_told_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steps").write_text("../../steps")  # what git writes with core.symlinks=false
    monkeypatch.setattr(nemotron, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(NemotronError, match="is not a directory") as caught:
        steps_root()
    assert caught.value.fix.startswith("git config core.symlinks true && git checkout")


def test_resolve_takes_a_full_id_or_a_unique_last_part(demo_root: Path) -> None:
    assert find_step("demo/use", demo_root).id == "demo/use"
    assert find_step("make", demo_root).id == "demo/make"


def test_resolve_lists_the_candidates_of_an_ambiguous_name(demo_root: Path) -> None:
    with pytest.raises(NemotronError, match="several steps") as caught:
        find_step("use", demo_root)
    assert caught.value.code == "step_ambiguous"
    assert caught.value.fix == "give the whole id: demo/use or other/use"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("demo/mkae", "did you mean demo/make?"),
        ("trian", "did you mean demo/train?"),
        ("zzz", "choose from: demo/loop, demo/make, demo/train, demo/use, other/use"),
    ],
)
def test_resolve_unknown_step_names_the_closest_id(demo_root: Path, name: str, fix: str) -> None:
    with pytest.raises(NemotronError, match=f"no step '{name}'") as caught:
        find_step(name, demo_root)
    assert caught.value.fix == fix


def test_select_combines_filters_and_knows_special_cases(demo_root: Path) -> None:
    steps = find_steps(demo_root)
    assert ids(select(steps, consumes="raw_jsonl")) == ["demo/make"]
    assert ids(select(steps, produces="packed_parquet", tag="fast")) == ["demo/make"]
    assert ids(select(steps, category="other")) == ["other/use"]
    assert select(steps, category="other", tag="fast") == []


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("category", "dmo", "did you mean demo?"),
        ("consumes", "raw_json", "did you mean raw_jsonl?"),
        ("produces", "xxx", "choose from: "),
        ("tag", "fats", "did you mean fast?"),
    ],
)
def test_select_refuses_a_filter_that_nothing_can_fit(
    demo_root: Path, name: str, value: str, fix: str
) -> None:
    with pytest.raises(NemotronError) as caught:
        select(find_steps(demo_root), **{name: value})
    assert caught.value.code == "filter_unknown"
    assert caught.value.fix.startswith(fix)


def test_config_names_puts_default_first(demo_root: Path) -> None:
    names = config_names(find_step("demo/use", demo_root))
    assert names == ["default", "broken", "silent", "tiny"]


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml"])
def test_find_config_takes_a_name_with_or_without_suffix(
    demo_root: Path, here: Path, name: str
) -> None:
    step = find_step("demo/use", demo_root)
    assert find_config(step, name) == demo_root / "demo/use/config/tiny.yaml"


def test_find_config_takes_paths(demo_root: Path, here: Path) -> None:
    step = find_step("demo/use", demo_root)
    (here / "sub").mkdir()
    for name in ("mine.yaml", "sub/mine.yaml"):
        (here / name).touch()
        assert find_config(step, name) == Path(name)
    assert find_config(step, str(here / "mine.yaml")) == here / "mine.yaml"


def test_find_config_refuses_a_name_that_means_two_files(demo_root: Path, here: Path) -> None:
    (here / "tiny.yaml").touch()
    with pytest.raises(NemotronError, match="also a file here") as caught:
        find_config(find_step("demo/use", demo_root), "tiny.yaml")
    assert caught.value.fix == "pass -c tiny for the step's config, or -c ./tiny.yaml for the file"


def test_find_config_lists_what_there_is(demo_root: Path, here: Path) -> None:
    step = find_step("demo/make", demo_root)
    with pytest.raises(NemotronError, match=r"it has: default, broken, silent, tiny") as caught:
        find_config(step, "tinny")
    assert caught.value.fix == "did you mean tiny?"
    with pytest.raises(NemotronError, match=r"no file \./nope\.yaml"):
        find_config(step, "./nope.yaml")


def test_schemas_and_checks_of_all_steps_import_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from nemotron.catalog import find_steps\n"
        "for step in find_steps():\n"
        "    step.load_schema().Config, step.load_checks()\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'tokenizers', 'transformers', 'nemo_run'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output.strip() == "[]"
