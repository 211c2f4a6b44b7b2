"""Artifacts: what a step leaves behind, and what the next step checks before it works.

Every artifact is a directory with an ``artifact.json``: its type, what produced it, from which
inputs, the size and BLAKE3 of each file, and the properties that consumers must match (tokenizer
digest, pack_size, base fingerprint, ...). A directory gets its final name only when it is complete:
``publish`` writes it aside, fsyncs it and renames it, so that a killed step leaves no half output.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from nemotron.errors import ExitCode, NemotronError

MANIFEST = "artifact.json"
TYPES_FILE = Path(__file__).parent / "steps" / "types.toml"
RESUME_DIR = ".resume"  # in a partial directory: what the next run needs to go on with it
_KEY_FILE = "key"
_WHY = {
    "artifact_damaged": "a file was cut short or changed after it was written",
    "artifact_format": "another version of nemotron wrote it; 1 had sha256 of files, 2 has BLAKE3",
}
_NUM_THREADS = min(8, os.cpu_count() or 1)  # that hash; BLAKE3 works outside of Python's lock


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Frozen):
    """One file of an artifact: path relative to its directory, size and digest."""

    path: str
    size_bytes: int
    blake3: str


class Producer(_Frozen):
    """What wrote an artifact: step id, digest of its config, version of the code."""

    step: str
    config_sha256: str
    code_version: str


class Input(_Frozen):
    """One input of an artifact, and the digest of its own ``artifact.json`` if it had one."""

    type: str
    path: str
    blake3: str | None = None


class Artifact(_Frozen):
    """The content of an ``artifact.json``."""

    type: str
    format_version: Literal[2] = 2
    produced_by: Producer
    inputs: tuple[Input, ...] = ()
    properties: dict[str, Any] = {}
    files: tuple[FileEntry, ...] = ()


def blake3_file(path: Path) -> str:
    """Return the hexadecimal BLAKE3 of a file, as ``b3sum`` prints it."""
    with path.open("rb") as stream:  # not mapped: that is SIGBUS where the file is cut meanwhile
        return hashlib.file_digest(stream, blake3).hexdigest()  # pyright: ignore[reportArgumentType]


def sha256_json(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_types() -> dict[str, str | None]:
    """Return every artifact type with the type that it is a special case of, or None."""
    table = tomllib.loads(TYPES_FILE.read_text(encoding="utf-8"))
    return {name: entry.get("is_a") for name, entry in table.items()}


def is_a(artifact_type: str, wanted: str) -> bool:
    """Return whether an artifact of ``artifact_type`` may stand where ``wanted`` is consumed."""
    types = load_types()
    current: str | None = artifact_type
    while current is not None and current != wanted:
        current = types.get(current)
    return current == wanted


def describe_input(artifact_type: str, path: Path) -> Input:
    """Return the lineage entry of an input; its digest is None where it carries no manifest."""
    manifest = path / MANIFEST
    digest = blake3_file(manifest) if manifest.is_file() else None
    return Input(type=artifact_type, path=str(path), blake3=digest)


def read_artifact(directory: Path, wanted: str) -> Artifact:
    """Return the manifest of the artifact in ``directory``.

    Raises:
        NemotronError: ``artifact_missing`` (there is none), ``artifact_damaged`` (it does not
            parse), ``artifact_format`` (of another version), ``artifact_type`` (of another type).
    """
    manifest = directory / MANIFEST
    if not manifest.is_file():
        what = "has no artifact.json" if directory.is_dir() else "does not exist"
        raise NemotronError(
            "artifact_missing",
            f"{directory} {what}; wanted an artifact of type {wanted}",
            where=str(directory),
            fix="run the step that produces it (nemotron steps list --produces " + wanted + ")",
            exit_code=ExitCode.DATA,
        )
    try:
        artifact = Artifact.model_validate_json(manifest.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if place == "format_version":
            problem = f"{manifest} is of format {first['input']}: {first['msg']}"
            raise _damaged(directory, problem, code="artifact_format") from None
        raise _damaged(directory, f"{manifest}: {place}: {first['msg']}") from None
    if not is_a(artifact.type, wanted):
        raise NemotronError(
            "artifact_type",
            f"{directory} is of type {artifact.type}; wanted {wanted}",
            where=str(manifest),
            fix=f"pass a directory of type {wanted}",
            exit_code=ExitCode.DATA,
        )
    return artifact


def verify_files(directory: Path, artifact: Artifact, *, digests: bool = True) -> None:
    """Check that every file of an artifact is there with its size and, unless told not to, digest.

    Raises:
        NemotronError: ``artifact_damaged``, naming the first file that differs.
    """
    for entry in artifact.files:
        path = directory / entry.path
        if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
            raise _damaged(directory, f"{entry.path!r} in artifact.json points outside {directory}")
        if not path.is_file():
            raise _damaged(directory, f"{path} is missing")
        if (size_bytes := path.stat().st_size) != entry.size_bytes:
            got = f"{path} is {size_bytes} bytes; artifact.json says {entry.size_bytes}"
            raise _damaged(directory, got)
    if not digests:
        return
    found = _blake3_files(directory, [entry.path for entry in artifact.files])
    wrong = [directory / each.path for each in artifact.files if found[each.path] != each.blake3]
    if wrong:
        raise _damaged(directory, f"{wrong[0]} does not have the BLAKE3 that artifact.json says")


def refuse_unlisted(directory: Path, artifact: Artifact, pattern: str) -> None:
    """Refuse files below an artifact that match a glob and are not in its manifest.

    Raises:
        NemotronError: ``artifact_unlisted``, naming the first such file.
    """
    listed = {directory / entry.path for entry in artifact.files}
    for path in sorted(set(directory.glob(pattern)) - listed):
        raise NemotronError(
            "artifact_unlisted",
            f"{path} is not in artifact.json",
            where=str(directory),
            why="it was put there after the artifact was written, or is left of an earlier copy",
            fix="remove it, or copy the artifact again into an empty directory",
            exit_code=ExitCode.DATA,
        )


@contextlib.contextmanager
def publish(directory: Path, *, resume_key: str | None = None) -> Iterator[Path]:
    """Yield a directory beside ``directory``; give it that name when the block ended well.

    An earlier artifact under that name stays readable until the swap and is then removed; when the
    block raises, or the process is killed, it is untouched.

    The directory is empty, unless ``resume_key`` is given and an earlier run with that key was
    killed: then it holds what that run left, and ``RESUME_DIR`` in it what the block noted there.
    With a key, only a ``NemotronError`` takes the work away: going on would meet it again.

    Raises:
        NemotronError: ``output_not_ours`` (the directory holds something that no step wrote),
            ``output_locked`` (another process is writing the same output).
    """
    directory = directory.absolute()
    _refuse_foreign(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with hold(directory):
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


def _prepare(partial: Path, notes: Path, resume_key: str | None) -> None:
    """Make the directory, or keep it as it is where it was left by a run with the same key.

    Of a run that was killed when all was done but the name, the notes lie beside the directory.
    """
    if partial.is_dir() and notes.is_dir() and not (partial / RESUME_DIR).exists():
        notes.rename(partial / RESUME_DIR)
    shutil.rmtree(notes, ignore_errors=True)
    key_file = partial / RESUME_DIR / _KEY_FILE
    if resume_key is not None and key_file.is_file() and key_file.read_text() == resume_key:
        for name in (MANIFEST, f".{MANIFEST}.partial"):
            (partial / name).unlink(missing_ok=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if resume_key is not None:
        key_file.parent.mkdir()
        write_text(key_file, resume_key)


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold the writer's lock of an output directory; the kernel frees it when the holder dies.

    Raises:
        NemotronError: ``output_locked``: another process is writing the same output.
    """
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
        stream.truncate(0)
        job = os.environ.get("NEMOTRON_JOB", "")
        name = f"job {job}, " if job else ""
        stream.write(f"{name}pid {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def write_artifact(
    directory: Path,
    *,
    artifact_type: str,
    produced_by: Producer,
    inputs: Sequence[Input] = (),
    properties: Mapping[str, Any] | None = None,
    digests: Mapping[str, str] | None = None,
) -> Artifact:
    """Write ``artifact.json`` over all files now in ``directory``; call it last, in ``publish``.

    ``digests`` has the BLAKE3 of those files, by relative path, whose writer took it from the bytes
    that it wrote; they are not read again.

    Raises:
        ValueError: ``artifact_type`` is not in ``steps/types.toml``.
    """
    if artifact_type not in load_types():
        raise ValueError(f"artifact type {artifact_type!r} is not in {TYPES_FILE}")
    names = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    files = [name.as_posix() for name in names if name.parts[0] != RESUME_DIR]
    known = dict(digests or {})
    known |= _blake3_files(directory, [file for file in files if file not in known])
    artifact = Artifact(
        type=artifact_type,
        produced_by=produced_by,
        inputs=tuple(inputs),
        properties=dict(properties or {}),
        files=tuple(
            FileEntry(path=file, size_bytes=(directory / file).stat().st_size, blake3=known[file])
            for file in files
        ),
    )
    write_text(directory / MANIFEST, artifact.model_dump_json(indent=2) + "\n")
    return artifact


def _blake3_files(directory: Path, files: Sequence[str]) -> dict[str, str]:
    """Return the digest of each file, hashed by several threads, of which the calling one is one.

    It begins with the largest: a rank whose main thread only waited for the others, minutes for a
    large base, would be taken for one that hangs.
    """
    digests: dict[str, str] = {}

    def hash_all(some: Iterable[str]) -> None:
        for file in some:
            digests[file] = blake3_file(directory / file)

    by_size = sorted(files, key=lambda file: (directory / file).stat().st_size, reverse=True)
    rest = iter(by_size[1:])  # shared: each thread takes the next
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        others = threads.map(hash_all, [rest] * (_NUM_THREADS - 1))
        hash_all(by_size[:1])
        hash_all(rest)
        list(others)  # raises what they raised
    return digests


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears complete or not at all: aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


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


def _refuse_foreign(directory: Path) -> None:
    if directory.is_file() or directory.is_symlink():
        held = "is not a directory"
    elif directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).is_file():
        held = "holds files that no step of nemotron wrote"
    else:
        return
    raise NemotronError(
        "output_not_ours",
        f"{directory} {held}; it would be replaced",
        where=str(directory),
        fix="choose another output directory, or empty this one yourself",
        exit_code=ExitCode.IO,
    )


def _make_durable(directory: Path) -> None:
    """Fsync every file and directory, with the permissions that the umask asks for.

    safetensors writes 0600 whatever the umask, which hides an adapter on shared storage.
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
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    _fsync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _damaged(directory: Path, problem: str, *, code: str = "artifact_damaged") -> NemotronError:
    return NemotronError(
        code,
        problem,
        where=str(directory),
        why=_WHY[code],
        fix="write the artifact again with the step that produced it",
        exit_code=ExitCode.DATA,
    )
