"""Gives an output directory its name once it is complete, and never before.

The directory is written aside, fsynced and renamed, under a lock, so that a killed step leaves no
partial output and no two runs write the same one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from nemotron.errors import ExitCode, NemotronError, writing
from nemotron.files import write_atomically

MANIFEST = "artifact.json"
RESUME_DIR = ".resume"  # in a partial directory: what the next run needs to continue it
_KEY_FILE = "key"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some parallel file systems


@contextlib.contextmanager
def publish(directory: Path, *, step: str, resume_key: str | None = None) -> Iterator[Path]:
    """Yield a directory beside ``directory``, and rename it to that when the block ends well.

    An earlier artifact of the same ``step`` under that name stays readable until the swap and is
    removed afterwards; if the block raises or the process is killed, it is left alone. The swap is
    two renames: if the process is killed between them, the earlier artifact is left as
    ``.NAME.old``, and the next ``publish`` puts it back.

    The directory is empty, unless ``resume_key`` is given and an earlier run with the same key was
    killed: then it holds what that run left, with the block's own notes in ``RESUME_DIR``. With a
    key, the work is only removed after a ``NemotronError``, which a resumed run would meet again.

    Raises:
        NemotronError: ``output_not_ours`` (the directory holds something that this step did not
            write), ``output_locked`` (another process is writing the same output).
    """
    directory = directory.absolute()
    _refuse_foreign(directory, step)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with writing(directory), hold(directory):
        if (old := _aside(directory)).is_dir() and not directory.exists():
            old.rename(directory)
        partial = directory.with_name(f".{directory.name}.partial")
        notes = directory.with_name(f".{directory.name}{RESUME_DIR}")
        _prepare(partial, notes, resume_key)
        try:
            yield partial
            _make_durable(partial)
            if resume_key is not None:
                (partial / RESUME_DIR).rename(notes)
            _swap(partial, directory)
            shutil.rmtree(notes, ignore_errors=True)
        except BaseException as error:
            if resume_key is None or isinstance(error, NemotronError):
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of an output directory; if the holder dies, the kernel releases it.

    Raises:
        NemotronError: ``output_locked``: another process is writing the same output.
    """
    directory = directory.absolute()  # "." has no name
    path = directory.with_name(f".{directory.name}.lock")
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise NemotronError(
                "output_locked",
                f"another run is writing {directory} ({stream.read().strip() or 'holder unknown'})",
                where=str(path),
                fix="wait for it to end, or choose another output directory",
                exit_code=ExitCode.LOCKED,
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _say_unlocked()
        stream.truncate(0)
        job = os.environ.get("NEMOTRON_JOB", "")
        name = f"job {job}, " if job else ""
        stream.write(f"{name}pid {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def refuse_overlap(output: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output directory that is, holds, or lies in one of the inputs.

    Raises:
        NemotronError: ``output_path_overlaps_inputs``.
    """
    resolved = output.resolve()
    for key, path in inputs.items():
        source = path.resolve()
        if resolved == source or resolved in source.parents or source in resolved.parents:
            raise NemotronError(
                "output_path_overlaps_inputs",
                f"the output {output} overlaps the input {key}={path}",
                where=str(output),
                fix="choose an output directory outside of every input",
            )


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears completely or not at all; several may write it at once."""
    write_atomically(path, text)


@cache
def _say_unlocked() -> None:
    """Say that there are no locks, but once: a training takes a lock for every save."""
    text = "note: the output's file system has no locks; make sure that no other run writes there"
    print(text, file=sys.stderr)


def _prepare(partial: Path, notes: Path, resume_key: str | None) -> None:
    """Make the directory, or keep it if a run with the same key has left it.

    If that run was killed just before the final rename, its notes lie beside the directory.
    """
    if partial.is_dir() and notes.is_dir() and not (partial / RESUME_DIR).exists():
        notes.rename(partial / RESUME_DIR)
    shutil.rmtree(notes, ignore_errors=True)
    key_file = partial / RESUME_DIR / _KEY_FILE
    if resume_key is not None and key_file.is_file() and key_file.read_text() == resume_key:
        (partial / MANIFEST).unlink(missing_ok=True)
        for unfinished in partial.rglob(".*.partial"):  # of a process that was killed
            unfinished.unlink()
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if resume_key is not None:
        key_file.parent.mkdir()
        write_text(key_file, resume_key)


def _refuse_foreign(directory: Path, step: str) -> None:
    fix = "choose another output directory, or empty this one yourself"
    if directory.is_symlink():
        held = "is a symbolic link"
        fix = f"choose {directory.resolve()}, which it points to, or a directory below it"
    elif directory.exists() and not directory.is_dir():
        held = "is not a directory"
    elif directory.is_mount():
        held, fix = "is a mount point", "choose a directory below it"
    elif directory.is_dir() and any(directory.iterdir()):
        held = _held_beside(directory, step)
    else:
        return
    if held:
        raise NemotronError(
            "output_not_ours",
            f"{directory} {held}; it would be replaced",
            where=str(directory),
            fix=fix,
            exit_code=ExitCode.IO,
        )


def _held_beside(directory: Path, step: str) -> str:
    """Return what a directory holds beside an artifact of ``step``, in words; "" for nothing."""
    if not (directory / MANIFEST).is_file():
        return "holds files that no step of nemotron wrote"
    try:
        artifact = json.loads((directory / MANIFEST).read_bytes())
        writer = artifact["produced_by"]["step"]
        written = {MANIFEST, *(entry["path"] for entry in artifact["files"])}
    except (ValueError, KeyError, TypeError):
        return f"holds an {MANIFEST} that cannot be read, so that any file there may be yours"
    if writer != step:
        return f"was written by {writer}"
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in found]
    foreign = [name for name in names if name not in written]
    return f"holds {foreign[0]}, which {step} did not write" if foreign else ""


def _make_durable(directory: Path) -> None:
    """Fsync every file and directory, and set the permissions that the umask asks for.

    safetensors writes files with 0600 whatever the umask is, which hides them on shared storage.
    """
    umask = os.umask(0)
    os.umask(umask)
    for root, _, names in os.walk(directory):
        for name in names:
            path = Path(root) / name
            path.chmod(0o666 & ~umask)
            _fsync(path)
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(partial: Path, directory: Path) -> None:
    old = _aside(directory)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    _fsync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(directory: Path) -> Path:
    """Return where the earlier artifact lies while the new one takes its name."""
    return directory.with_name(f".{directory.name}.old")
