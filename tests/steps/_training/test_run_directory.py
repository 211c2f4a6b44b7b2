"""The directory of a run: an earlier run makes room, nothing else is moved or deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron.errors import NemotronError
from nemotron.steps._training.run_directory import retain_newest, room_for, start_directory


def a_run(directory: Path, *iterations: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").touch()
    for iteration in iterations:
        (directory / f"iter_{iteration:07d}").mkdir()
    return directory


def test_a_run_that_never_saved_does_not_take_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    output = a_run(tmp_path / "out", 8)
    assert start_directory(output, load=None) == tmp_path / "out.previous"
    for _ in range(2):  # preempted before the first save, twice
        (output / "metrics.jsonl").touch()
        assert start_directory(output, load=None) == tmp_path / "out.unsaved"
    assert (tmp_path / "out.previous" / "iter_0000008").is_dir()


@pytest.mark.parametrize("name", ["out", "out.previous"])
def test_what_no_run_wrote_is_neither_moved_nor_deleted(tmp_path: Path, name: str) -> None:
    a_run(tmp_path / "run", 8).rename(tmp_path / "out")
    if name == "out":
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / name / "iter_0000008").mkdir(parents=True)  # as of a Megatron checkpoint
    (tmp_path / name / "thesis.tex").write_text("years")
    with pytest.raises(NemotronError, match=f"{name} has files that no run wrote") as caught:
        start_directory(tmp_path / "out", load=None)
    assert caught.value.code == "output_not_ours"
    assert (tmp_path / name / "thesis.tex").read_text() == "years"


def test_an_output_that_is_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("years")
    with pytest.raises(NemotronError, match="has files that no run wrote"):
        start_directory(tmp_path / "out", load=None)
    assert (tmp_path / "out").read_text() == "years"


@pytest.mark.parametrize("load", ["out.previous", "out/sub"])
def test_the_run_that_is_gone_on_from_does_not_make_room(tmp_path: Path, load: str) -> None:
    output = a_run(tmp_path / "out", 8)
    (tmp_path / load).mkdir()
    if load == "out.previous":
        (tmp_path / load / "metrics.jsonl").touch()
    with pytest.raises(NemotronError, match=r"the new run would move or delete") as caught:
        start_directory(output, load=tmp_path / load)
    assert caught.value.code == "output_path_overlaps_inputs"
    assert (tmp_path / load).is_dir()
    assert (output / "iter_0000008").is_dir()


def test_runs_in_a_link_stay_where_it_leads(tmp_path: Path) -> None:
    a_run(tmp_path / "scratch" / "out", 8)
    link = tmp_path / "out"
    link.symlink_to("scratch/out")
    for _ in range(2):
        assert start_directory(link, load=None) == tmp_path / "scratch" / "out.previous"
        assert link.is_symlink()
        assert list(link.iterdir()) == []
        (link / "iter_0000001").mkdir()
        (link / "iter_0000001" / "adapter_config.json").touch()


def test_a_link_that_leads_nowhere_yet_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("scratch/out")
    assert start_directory(tmp_path / "out", load=None) is None
    assert (tmp_path / "scratch" / "out").is_dir()


def test_an_empty_directory_needs_no_room(tmp_path: Path) -> None:
    assert room_for(tmp_path / "out", load=None) is None
    assert start_directory(tmp_path / "out", load=tmp_path / "out.previous") is None
    assert start_directory(tmp_path / "out", load=None) is None


def test_the_working_directory_is_no_place_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(a_run(tmp_path / "out", 1))
    for place in (Path(), tmp_path / "out"):
        with pytest.raises(NemotronError, match="out is the working directory") as caught:
            start_directory(place, load=None)
        assert caught.value.code == "output_not_ours"
    assert (tmp_path / "out" / "iter_0000001").is_dir()


def test_a_save_that_cannot_be_read_counts_as_damaged(tmp_path: Path) -> None:
    # As on a disk with bad sectors: the error of the old save is not one of the new.
    output = a_run(tmp_path / "out", 1, 2)
    loop = output / "iter_0000002" / "artifact.json"
    loop.symlink_to(loop)
    retain_newest(output, 1, until=2)
    assert sorted(path.name for path in output.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
