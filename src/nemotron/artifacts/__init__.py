"""Artifacts: what a step leaves behind, and what the next step checks before it works.

Every artifact is a directory with an ``artifact.json``, which records its type, its producer and
inputs, the size and BLAKE3 of each file, and the properties that consumers must match (tokenizer
digest, pack_size, base fingerprint, ...). A directory gets its final name only when it is complete:
``publish`` writes it aside, fsyncs it and renames it, so that a killed step leaves no partial
output.
"""

from nemotron.artifacts.digests import Pieces, blake3_file, sha256_json
from nemotron.artifacts.publishing import (
    MANIFEST,
    RESUME_DIR,
    hold,
    publish,
    refuse_overlap,
    write_text,
)
from nemotron.artifacts.record import (
    Artifact,
    FileEntry,
    Input,
    Producer,
    describe_input,
    is_a,
    is_as_recorded,
    load_types,
    read_artifact,
    refuse_unlisted,
    verify_files,
    write_artifact,
)

__all__ = [
    "MANIFEST",
    "RESUME_DIR",
    "Artifact",
    "FileEntry",
    "Input",
    "Pieces",
    "Producer",
    "blake3_file",
    "describe_input",
    "hold",
    "is_a",
    "is_as_recorded",
    "load_types",
    "publish",
    "read_artifact",
    "refuse_overlap",
    "refuse_unlisted",
    "sha256_json",
    "verify_files",
    "write_artifact",
    "write_text",
]
