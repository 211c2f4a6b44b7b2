"""nemotron.artifacts.record: what an artifact says of itself, and is checked for."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
from blake3 import blake3

from nemotron.artifacts import (
    MANIFEST,
    Artifact,
    Producer,
    blake3_file,
    describe_input,
    digests,
    is_a,
    load_types,
    publish,
    read_artifact,
    refuse_unlisted,
    sha256_json,
    verify_files,
    write_artifact,
)
from nemotron.errors import ExitCode, NemotronError

PRODUCER = Producer(step="demo/make", config_sha256="0" * 64, code_version="1")


def make(directory: Path, artifact_type: str = "packed_parquet") -> Artifact:
    with publish(directory, step=PRODUCER.step) as partial:
        (partial / "data").mkdir()
        (partial / "data" / "a.txt").write_text("aaa")
        return write_artifact(
            partial,
            artifact_type=artifact_type,
            produced_by=PRODUCER,
            properties={"pack_size": 8},
        )


def test_a_published_artifact_is_read_back_whole(tmp_path: Path) -> None:
    written = make(tmp_path / "out")
    artifact = read_artifact(tmp_path / "out", "packed_parquet")
    assert artifact == written
    assert artifact.properties == {"pack_size": 8}
    assert [(entry.path, entry.size_bytes) for entry in artifact.files] == [("data/a.txt", 3)]
    verify_files(tmp_path / "out", artifact)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_verify_files_names_a_file_that_is_missing_short_or_changed(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    path = tmp_path / "out" / "data" / "a.txt"
    path.write_text("bbb")
    with pytest.raises(NemotronError, match="does not have the BLAKE3"):
        verify_files(tmp_path / "out", artifact)
    verify_files(tmp_path / "out", artifact, digests=False)
    path.write_text("a")
    with pytest.raises(NemotronError, match=r"is 1 bytes; artifact\.json says 3") as caught:
        verify_files(tmp_path / "out", artifact)
    assert caught.value.exit_code is ExitCode.DATA
    path.unlink()
    with pytest.raises(NemotronError, match=r"a\.txt is missing"):
        verify_files(tmp_path / "out", artifact)


def test_verify_files_compares_every_file_of_several(tmp_path: Path) -> None:
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        for name in "abc":
            (partial / name).write_text(name)
        artifact = write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    for name in "abc":
        path = tmp_path / "out" / name
        path.write_text("x")
        with pytest.raises(NemotronError, match=rf"out/{name} does not have the BLAKE3"):
            verify_files(tmp_path / "out", artifact)
        path.write_text(name)
    verify_files(tmp_path / "out", artifact)


def test_a_file_may_have_a_digest_of_each_of_its_pieces(tmp_path: Path) -> None:
    pieces = [b"header", b"", b"first", b"second tensor"]
    by_piece = tuple((len(piece), blake3(piece).hexdigest()) for piece in pieces)
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        (partial / "weights").write_bytes(b"".join(pieces))
        known = {"weights": by_piece}
        artifact = write_artifact(
            partial, artifact_type="checkpoint_lora", produced_by=PRODUCER, digests=known
        )
    assert read_artifact(tmp_path / "out", "checkpoint_lora") == artifact
    verify_files(tmp_path / "out", artifact)
    with (tmp_path / "out" / "weights").open("r+b") as stream:
        stream.seek(len(b"headerfirst"))
        stream.write(b"S")
    with pytest.raises(NemotronError, match=r"does not have .*: bytes 11 to 24"):
        verify_files(tmp_path / "out", artifact)


@pytest.mark.parametrize("pieces", [[[2, "0" * 64]], [[4, "0" * 64], [-1, "0" * 64]], []])
def test_pieces_that_are_not_the_file_are_damage(tmp_path: Path, pieces: list[Any]) -> None:
    make(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    record = json.loads(manifest.read_text())
    record["files"][0]["blake3"] = pieces
    manifest.write_text(json.dumps(record))
    with pytest.raises(NemotronError, match=r"artifact\.json: files\.0") as caught:
        read_artifact(tmp_path / "out", "packed_parquet")
    assert caught.value.code == "artifact_damaged"


def test_an_artifact_with_a_digest_of_each_file_only_is_read_as_before(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 3', '"format_version": 2'))
    assert read_artifact(tmp_path / "out", "packed_parquet").files == artifact.files


def test_the_calling_thread_hashes_along_and_takes_the_largest_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rank whose main thread only waits for other threads is taken for one that hangs.
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        for number in range(9):
            (partial / f"{number}.bin").write_bytes(bytes(1000 if number == 5 else number))
        artifact = write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    hashed: dict[str, threading.Thread] = {}

    def hash_file(path: Path, *piece: int) -> str:
        hashed[path.name] = threading.current_thread()
        return blake3_file(path, *piece)

    monkeypatch.setattr(digests, "blake3_file", hash_file)
    verify_files(tmp_path / "out", artifact)
    assert hashed["5.bin"] is threading.current_thread()
    assert sorted(hashed) == [entry.path for entry in artifact.files]


def test_a_file_that_another_thread_cannot_read_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with publish(tmp_path / "out", step=PRODUCER.step) as partial:
        (partial / "large.bin").write_bytes(bytes(1000))
        (partial / "small.bin").write_bytes(b"x")
        artifact = write_artifact(partial, artifact_type="checkpoint_lora", produced_by=PRODUCER)
    was_tried = threading.Event()

    def hash_file(path: Path, *piece: int) -> str:
        if path.name == "large.bin":
            assert was_tried.wait(timeout=10)
            return blake3_file(path, *piece)
        was_tried.set()
        raise OSError("no such luck")

    monkeypatch.setattr(digests, "_NUM_THREADS", 2)
    monkeypatch.setattr(digests, "blake3_file", hash_file)
    with pytest.raises(OSError, match="no such luck"):
        verify_files(tmp_path / "out", artifact)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret"])
def test_verify_files_stays_inside_of_the_directory(tmp_path: Path, path: str) -> None:
    artifact = make(tmp_path / "out")
    entry = artifact.files[0].model_copy(update={"path": path})
    with pytest.raises(NemotronError, match="points outside"):
        verify_files(tmp_path / "out", artifact.model_copy(update={"files": (entry,)}))


def test_a_file_that_the_manifest_does_not_list_is_refused_where_a_reader_would_take_it(
    tmp_path: Path,
) -> None:
    artifact = make(tmp_path / "out")
    (tmp_path / "out" / "notes.md").touch()
    refuse_unlisted(tmp_path / "out", artifact, "data/*.txt")
    (tmp_path / "out" / "data" / "b.txt").touch()
    with pytest.raises(NemotronError, match=r"data/b\.txt is not in artifact\.json") as caught:
        refuse_unlisted(tmp_path / "out", artifact, "data/*.txt")
    assert (caught.value.code, caught.value.exit_code) == ("artifact_unlisted", ExitCode.DATA)
    assert "remove it" in caught.value.fix


def test_read_artifact_says_what_is_missing_damaged_or_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(NemotronError, match="does not exist"):
        read_artifact(tmp_path / "out", "packed_parquet")
    (tmp_path / "out").mkdir()
    with pytest.raises(NemotronError, match=r"has no artifact\.json") as caught:
        read_artifact(tmp_path / "out", "packed_parquet")
    assert "--produces packed_parquet" in caught.value.fix
    (tmp_path / "out" / MANIFEST).write_text('{"type": "packed_parquet", "typo": 1}')
    with pytest.raises(NemotronError) as caught:
        read_artifact(tmp_path / "out", "packed_parquet")
    assert caught.value.code == "artifact_damaged"
    make(tmp_path / "ours")
    with pytest.raises(NemotronError, match="is of type packed_parquet; wanted checkpoint_hf"):
        read_artifact(tmp_path / "ours", "checkpoint_hf")


def test_an_artifact_of_another_format_is_refused_in_words(tmp_path: Path) -> None:
    # What a version that recorded sha256 wrote: no file of it is damaged.
    make(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    text = manifest.read_text().replace('"format_version": 3', '"format_version": 1')
    manifest.write_text(text.replace('"blake3": ', '"sha256": '))
    with pytest.raises(NemotronError, match="has format 1: Input should be 2 or 3") as caught:
        read_artifact(tmp_path / "out", "packed_parquet")
    assert caught.value.code == "artifact_format"
    assert caught.value.exit_code is ExitCode.DATA
    assert "another version of nemotron" in caught.value.why
    assert "again with the step that wrote it" in caught.value.fix


def test_a_digest_is_the_blake3_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()  # the first of the specification's test vectors
    assert blake3_file(tmp_path / "empty").startswith("af1349b9f5f9a1a6a0404dea36dcc949")
    content = Random(0).randbytes((1 << 19) + 1)  # more than is read at once
    (tmp_path / "some").write_bytes(content)
    assert blake3_file(tmp_path / "some") == blake3(content).hexdigest()


def test_is_a_follows_the_types_upward_only() -> None:
    assert is_a("raw_jsonl", "training_jsonl")
    assert is_a("training_jsonl", "training_jsonl")
    assert not is_a("training_jsonl", "raw_jsonl")
    assert not is_a("unheard_of", "training_jsonl")


def test_every_parent_type_exists_and_no_type_is_its_own_ancestor() -> None:
    types = load_types()
    for name in types:
        seen: list[str] = []
        current: str | None = name
        while current is not None:
            assert current not in seen
            seen.append(current)
            current = types[current]


def test_write_artifact_refuses_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_onnx"):
        write_artifact(tmp_path, artifact_type="checkpoint_onnx", produced_by=PRODUCER)


def test_describe_input_has_the_digest_of_the_manifest_if_there_is_one(tmp_path: Path) -> None:
    make(tmp_path / "out")
    described = describe_input("packed_parquet", tmp_path / "out")
    assert described.blake3 == blake3_file(tmp_path / "out" / MANIFEST)
    assert describe_input("training_jsonl", tmp_path / "chat.jsonl").blake3 is None


def test_sha256_json_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json(json.loads('{"b": [2], "a": 1}'))
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
