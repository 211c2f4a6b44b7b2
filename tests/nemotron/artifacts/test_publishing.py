"""nemotron.artifacts.publishing: a directory appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from nemotron.artifacts import (
    MANIFEST,
    Producer,
    hold,
    publish,
    publishing,
    refuse_overlap,
    write_artifact,
    write_text,
)
from nemotron.errors import ExitCode, NemotronError

PRODUCER = Producer(step="demo/make", config_sha256="0" * 64, code_version="1")


def make(directory: Path, text: str = "aaa") -> None:
    with publish(directory, step=PRODUCER.step) as partial:
        (partial / "a.txt").write_text(text)
        write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)


def test_publish_leaves_nothing_when_the_block_fails_and_keeps_the_earlier_one(
    tmp_path: Path,
) -> None:
    def fail() -> None:
        with publish(tmp_path / "out", step=PRODUCER.step) as partial:
            (partial / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "out" / "a.txt").read_text() == "aaa"


def test_publish_replaces_an_earlier_artifact_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        (partial / "b.txt").touch()
        write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, "b.txt"]


def test_publish_refuses_what_no_step_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(NemotronError, match="no step of nemotron wrote") as caught:
        make(tmp_path / "thesis")
    assert caught.value.code == "output_not_ours"
    (tmp_path / "file").touch()
    with pytest.raises(NemotronError, match="is not a directory"):
        make(tmp_path / "file")


def test_publish_refuses_the_output_of_another_step(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with (
        pytest.raises(NemotronError, match="out was written by demo/make") as caught,
        publish(tmp_path / "out", step="demo/other"),
    ):
        pass
    assert caught.value.code == "output_not_ours"
    assert (tmp_path / "out" / "a.txt").read_text() == "aaa"


def test_publish_refuses_to_delete_a_file_that_somebody_put_there(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine.md").write_text("mine")
    with pytest.raises(NemotronError, match=r"holds notes/mine\.md, which demo/make did not write"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "notes" / "mine.md").read_text() == "mine"


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"produced_by": {}, "files": []}'])
def test_publish_deletes_nothing_where_a_damaged_record_cannot_say_who_wrote_it(
    tmp_path: Path, manifest: str
) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text(manifest)
    with pytest.raises(NemotronError, match="cannot be read") as caught:
        make(tmp_path / "out", "bbb")
    assert caught.value.code == "output_not_ours"
    assert (tmp_path / "out" / "a.txt").read_text() == "aaa"


def test_publish_refuses_what_is_neither_directory_nor_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # as a device would be, such as /dev/null
    with pytest.raises(NemotronError, match="is not a directory") as caught:
        make(tmp_path / "pipe")
    assert caught.value.code == "output_not_ours"
    assert (tmp_path / "pipe").is_fifo()


def test_publish_refuses_what_it_could_not_rename_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(NemotronError, match=r": /proc is a mount point") as caught:
        make(Path("/proc"))
    assert caught.value.fix == "choose a directory below it"
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NemotronError, match="link is a symbolic link") as caught:
        make(tmp_path / "link")
    assert caught.value.fix == f"choose {tmp_path}, which it points to, or a directory below it"


def test_publish_puts_back_what_a_kill_in_the_midst_of_the_swap_left(tmp_path: Path) -> None:
    make(tmp_path / "out")
    killed = multiprocessing.get_context("fork").Process(target=die_in_the_swap, args=[tmp_path])
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "out", step=PRODUCER.step):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "a.txt").read_text() == "aaa"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def die_in_the_swap(root: Path) -> None:
    rename = Path.rename

    def rename_and_die(path: Path, target: Path) -> None:
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(Path, "rename", rename_and_die)
    make(root / "out", "bbb")


def test_publish_puts_back_the_earlier_artifact_where_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", "bbb")
    assert (tmp_path / "out" / "a.txt").read_text() == "aaa"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_publish_refuses_a_second_writer_and_names_the_first(tmp_path: Path) -> None:
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        with pytest.raises(NemotronError, match=f"pid {os.getpid()}") as caught:
            make(tmp_path / "out")
        write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    assert caught.value.exit_code is ExitCode.LOCKED
    make(tmp_path / "out")


def test_write_text_lets_writers_of_one_file_overlap(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, failed = context.Barrier(4), context.Value("i", 0)

    def write() -> None:
        for number in range(50):
            barrier.wait()
            try:
                write_text(tmp_path / "x", f"{number}\n" * 1000)
            except OSError:
                with failed.get_lock():
                    failed.value += 1

    children = [context.Process(target=write) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert failed.value == 0
    assert (tmp_path / "x").read_text() == "49\n" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_publish_goes_on_without_what_a_killed_writer_left_half_written(tmp_path: Path) -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        publish(tmp_path / "out", step=PRODUCER.step, resume_key="k") as partial,
    ):
        (partial / "whole").touch()
        (partial / f".{MANIFEST}.0a1b2c3d.partial").touch()
        raise KeyboardInterrupt
    with publish(tmp_path / "out", step=PRODUCER.step, resume_key="k") as partial:
        assert [path.name for path in partial.iterdir() if path.is_file()] == ["whole"]
        write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)


def test_published_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        private = partial / "private"
        private.touch(mode=0o600)
        write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode)
    assert mode == 0o666 & ~umask


@pytest.mark.parametrize("output", ["data", "data/inner/x", ".", "data/../data"])
def test_refuse_overlap_refuses_equal_inner_and_outer_paths(tmp_path: Path, output: str) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    with pytest.raises(NemotronError, match="overlaps the input packs=") as caught:
        refuse_overlap(tmp_path / output, {"packs": tmp_path / "data" / "inner"})
    assert caught.value.code == "output_path_overlaps_inputs"


def test_refuse_overlap_looks_through_links_and_allows_neighbours(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(NemotronError):
        refuse_overlap(tmp_path / "link", {"packs": tmp_path / "data"})
    refuse_overlap(tmp_path / "data2", {"packs": tmp_path / "data"})


def test_write_text_leaves_no_partial_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_system_without_locks_is_written_to_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    publishing._say_unlocked.cache_clear()
    for name in ("iter_0000010", "iter_0000020"):
        make(tmp_path / name)
        assert (tmp_path / name / "a.txt").is_file()
    said = capsys.readouterr().err
    assert said.count("the output's file system has no locks; make sure") == 1


def test_the_working_directory_can_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with hold(Path()):
        assert (tmp_path / ".out.lock").is_file()
