"""``artifact.json``: what it says, how it is written, and how files are checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from nemotron.artifacts.publishing import MANIFEST, RESUME_DIR, write_text
from nemotron.errors import ExitCode, NemotronError

TYPES_FILE = Path(__file__).parents[1] / "steps" / "types.toml"
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


def _damaged(directory: Path, problem: str, *, code: str = "artifact_damaged") -> NemotronError:
    return NemotronError(
        code,
        problem,
        where=str(directory),
        why=_WHY[code],
        fix="write the artifact again with the step that produced it",
        exit_code=ExitCode.DATA,
    )
