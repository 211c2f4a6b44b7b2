"""``artifact.json``: its content, how it is written, and how files are verified against it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator

from nemotron.artifacts.digests import FilePart, Pieces, blake3_file, blake3_parts
from nemotron.artifacts.publishing import MANIFEST, RESUME_DIR, write_text
from nemotron.errors import ExitCode, NemotronError

TYPES_FILE = Path(__file__).parents[1] / "steps" / "types.toml"
_WHY = {
    "artifact_damaged": "a file was truncated or changed after it was written",
    "artifact_format": "another version of nemotron wrote it; 1 has sha256 of files, 2 has BLAKE3, "
    "3 also has BLAKE3 of the pieces of files",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Frozen):
    """One file of an artifact: path relative to its directory, size, and digest or digests.

    A file of weights has a digest per tensor: its writer has taken them anyway, and several threads
    can verify the file.
    """

    path: str
    size_bytes: int
    blake3: str | tuple[tuple[NonNegativeInt, str], ...]

    @model_validator(mode="after")
    def _pieces_make_the_file(self) -> Self:
        if sum(size for size, _ in self.pieces) != self.size_bytes:
            raise ValueError(f"the pieces of {self.path} do not add up to {self.size_bytes} bytes")
        return self

    @property
    def pieces(self) -> Pieces:
        """The pieces of the file: the file itself if it has one digest."""
        return ((self.size_bytes, self.blake3),) if isinstance(self.blake3, str) else self.blake3


class Producer(_Frozen):
    """The producer of an artifact: step id, digest of its config, version of the code."""

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
    format_version: Literal[2, 3] = 3
    produced_by: Producer
    inputs: tuple[Input, ...] = ()
    properties: dict[str, Any] = {}
    files: tuple[FileEntry, ...] = ()


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
    """Return the lineage entry of an input; its digest is None if it has no manifest."""
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
            problem = f"{manifest} has format {first['input']}: {first['msg']}"
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
    """Check that every file of an artifact exists with its size and, if ``digests``, its digest.

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
    parts = [part for entry in artifact.files for part in _parts(entry)]
    for part, found in zip(parts, blake3_parts(directory, parts), strict=True):
        if found != part.blake3:
            problem = f"{directory / part.file} does not have the BLAKE3 in artifact.json"
            raise _damaged(directory, problem + part.place)


def is_as_recorded(directory: Path, entry: FileEntry) -> bool:
    """Return whether the bytes of a file have the digests of its entry."""
    parts = list(_parts(entry))
    return blake3_parts(directory, parts) == [part.blake3 for part in parts]


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
            why="it was added after the artifact was written, or is left over from an earlier copy",
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
    digests: Mapping[str, str | Pieces] | None = None,
) -> Artifact:
    """Write the ``artifact.json`` of all files now in ``directory``; call it last in ``publish``.

    ``digests`` has the BLAKE3, by relative path, of files whose writer took it from the bytes that
    it wrote, or that of their pieces; these files are not read again.

    Raises:
        ValueError: ``artifact_type`` is not in ``steps/types.toml``.
    """
    if artifact_type not in load_types():
        raise ValueError(f"artifact type {artifact_type!r} is not in {TYPES_FILE}")
    names = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    files = [name.as_posix() for name in names if name.parts[0] != RESUME_DIR]
    sizes = {file: (directory / file).stat().st_size for file in files}
    known = dict(digests or {})
    unknown = [FilePart(file, 0, sizes[file]) for file in files if file not in known]
    found = blake3_parts(directory, unknown)
    known |= {part.file: digest for part, digest in zip(unknown, found, strict=True)}
    artifact = Artifact(
        type=artifact_type,
        produced_by=produced_by,
        inputs=tuple(inputs),
        properties=dict(properties or {}),
        files=tuple(
            FileEntry(path=file, size_bytes=sizes[file], blake3=known[file]) for file in files
        ),
    )
    write_text(directory / MANIFEST, artifact.model_dump_json(indent=2) + "\n")
    return artifact


def _parts(entry: FileEntry) -> Iterator[FilePart]:
    start = 0
    for size, digest in entry.pieces:
        is_all = size == entry.size_bytes
        place = "" if is_all else f": bytes {start:,} to {start + size:,}"
        yield FilePart(entry.path, start, size, digest, place)
        start += size


def _damaged(directory: Path, problem: str, *, code: str = "artifact_damaged") -> NemotronError:
    return NemotronError(
        code,
        problem,
        where=str(directory),
        why=_WHY[code],
        fix="produce the artifact again with the step that wrote it",
        exit_code=ExitCode.DATA,
    )
