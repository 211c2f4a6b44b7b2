"""Our reader and writer of DCP directories against torch's own, and against hostile ones."""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.torch_dist_writer import torch_dist_writer

STACKED = "decoder.layers.mlp.linear_fc1.weight"


def _stacked() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, generator=generator)


def _write(directory: Path) -> Tensor:
    """Write a tensor as Megatron does at two tensor-parallel ranks: a chunk per layer and half."""
    whole = _stacked()
    directory.mkdir()
    with torch_dist_writer(directory) as writer:
        for layer, half in itertools.product(range(3), range(2)):
            chunk = whole[layer : layer + 1, 3 * half : 3 * half + 3]
            writer.write(STACKED, chunk, offsets=(layer, 3 * half, 0), global_shape=whole.shape)
        writer.write("output_layer.weight", whole[0].bfloat16())
        writer.write_object("decoder.layers.mlp.linear_fc1._extra_state/shard_0_3", [None])
    return whole


def _load_with_torch(directory: Path, state: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=FileSystemReader(directory), no_dist=True)


def _error(directory: Path) -> NemotronError:
    with pytest.raises(NemotronError) as caught:
        TorchDistReader(directory)
    assert caught.value.exit_code == ExitCode.DATA
    return caught.value


class Hostile:
    """Unpickles by creating the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    whole = _write(tmp_path / "c")
    state = {
        STACKED: torch.zeros_like(whole),
        "output_layer.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
    }
    _load_with_torch(tmp_path / "c", state)
    assert torch.equal(state[STACKED], whole)
    assert torch.equal(state["output_layer.weight"], whole[0].bfloat16())


# torch 2.10 uses what it has deprecated.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_read_gives_what_torch_wrote(tmp_path: Path) -> None:
    state = {"a": _stacked(), "b.c": torch.arange(5.0, dtype=torch.float64)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert set(reader.names) == {"a", "b.c"}
    assert "a" in reader
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


def test_every_slice_is_that_of_the_whole_tensor(tmp_path: Path) -> None:
    whole = _write(tmp_path / "c")
    reader = TorchDistReader(tmp_path / "c")
    cuts = [
        [slice(first, last) for first, last in itertools.combinations(range(size + 1), 2)]
        for size in whole.shape
    ]
    cuts[2] = cuts[2][::4]  # no chunk ends within these
    for index in itertools.product(*cuts):
        assert torch.equal(reader.read(STACKED, index), whole[index])
    assert torch.equal(reader.read(STACKED, [slice(1, 2)]), whole[1:2])
    assert torch.equal(reader.read(STACKED, [slice(None), slice(-2, None)]), whole[:, -2:])


def test_a_slice_opens_only_the_chunks_that_it_touches(tmp_path: Path) -> None:
    whole = _write(tmp_path / "c")
    reader = TorchDistReader(tmp_path / "c")
    file = tmp_path / "c" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    last_chunk = content.rindex(b"PK\x03\x04", 0, content.index(whole[2, 3:].numpy().tobytes()))
    content[last_chunk:] = bytes(len(content) - last_chunk)
    file.write_bytes(content)
    assert torch.equal(reader.read(STACKED, [slice(0, 2)]), whole[:2])
    assert torch.equal(reader.read(STACKED, [slice(2, 3), slice(0, 3)]), whole[2:, :3])
    with pytest.raises(NemotronError, match="does not load") as caught:
        reader.read(STACKED, [slice(2, 3), slice(2, 4)])
    assert caught.value.code == "artifact_damaged"


def test_write_stores_a_view_without_the_storage_behind_it(tmp_path: Path) -> None:
    big = torch.zeros(1000, 1000)
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", big[:2])
        writer.write("y", big[:, :2])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 30_000
    assert TorchDistReader(tmp_path).read("y").shape == (1000, 2)


def test_blocks_are_written_as_the_tensor_that_they_make_up(tmp_path: Path) -> None:
    whole, buffer = _stacked(), torch.empty(12, 4)
    for name, rows in (("whole", [6, 12]), ("blocks", [1] * 18)):
        blocks = whole.reshape(18, 4).split(rows)
        (tmp_path / name).mkdir()
        with torch_dist_writer(tmp_path / name) as writer:
            for key in ("x", "y"):
                # Each block lies where the one before lay.
                passing = (buffer[: len(rows)].copy_(rows) for rows in blocks)
                writer.write_blocks(key, passing, sizes=whole.shape, dtype=whole.dtype)
        assert torch.equal(TorchDistReader(tmp_path / name).read("y"), whole)
    one, other = ((tmp_path / name / "__0_0.distcp").read_bytes() for name in ("whole", "blocks"))
    assert one == other
    assert writer.blake3 == blake3(other).hexdigest()


@pytest.mark.parametrize(
    "block",
    [
        torch.zeros(0, 4).half(),
        torch.zeros(1, 4).half(),
        torch.zeros(3, 4).half(),
        torch.zeros(4, 2).half(),
        torch.zeros(2, 4).bfloat16(),
    ],
)
def test_write_blocks_refuses_other_than_was_announced(tmp_path: Path, block: Tensor) -> None:
    announced = pytest.raises(ValueError, match="x is not of the shape and type announced")
    with announced, torch_dist_writer(tmp_path) as writer:
        writer.write_blocks("x", iter([block]), sizes=(1, 2, 4), dtype=torch.float16)
    assert writer.blake3 == ""


def test_what_fails_while_blocks_are_made_is_the_error_of_the_writer(tmp_path: Path) -> None:
    def blocks(error: BaseException) -> Iterator[Tensor]:
        yield torch.zeros(1, 4)
        raise error from KeyError("not this")

    for error in (OSError("mine"), RuntimeError("mine"), KeyboardInterrupt("mine")):
        with pytest.raises(type(error), match="mine"), torch_dist_writer(tmp_path) as writer:
            writer.write_blocks("x", blocks(error), sizes=(2, 4), dtype=torch.float32)


def test_what_torch_cannot_pickle_is_the_error_of_the_writer(tmp_path: Path) -> None:
    class Stubborn:
        def __reduce__(self) -> str:
            raise RuntimeError("mine")

    try:
        raise KeyError("not this")
    except KeyError:
        with pytest.raises(RuntimeError, match="mine"), torch_dist_writer(tmp_path) as writer:
            writer.write_object("x", Stubborn())


def test_a_tensor_that_torch_hands_over_in_another_way_is_not_written_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def in_pieces(value: Any, stream: Any) -> None:
        memory = memoryview(value.numpy().reshape(-1).view("uint8"))
        stream.write(memory[:4])
        stream.write(memory[4:])

    for handing, problem in (
        (in_pieces, "torch.save hands over x in pieces"),
        (lambda value, stream: save(value.clone(), stream), "x is not of the shape and type"),
    ):
        monkeypatch.setattr(torch, "save", handing)
        with pytest.raises(ValueError, match=problem), torch_dist_writer(tmp_path) as writer:
            writer.write("x", torch.ones(3))


def test_the_callers_default_device_is_of_no_matter(tmp_path: Path) -> None:
    with torch_dist_writer(tmp_path) as writer, torch.device("meta"):
        writer.write("x", torch.ones(3, device="cpu"))
    assert torch.equal(TorchDistReader(tmp_path).read("x"), torch.ones(3))


def test_write_refuses_chunks_of_another_type_and_leaves_no_metadata(tmp_path: Path) -> None:
    one_type = pytest.raises(ValueError, match="x: the chunks of one tensor must have one type")
    with one_type, torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(1), global_shape=(2,))
        writer.write("x", torch.zeros(1).half(), offsets=(1,), global_shape=(2,))
    assert _error(tmp_path).code == "checkpoint_missing"


def test_open_runs_nothing_of_a_hostile_metadata(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    canary = tmp_path / "canary"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(Hostile(canary), protocol=protocol)
        (tmp_path / "c" / ".metadata").write_bytes(content)
        error = _error(tmp_path / "c")
        assert error.code == "unsafe_pickle"
        assert "touch" in error.problem or "getattr" in error.problem
    assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("os\nsystem", "builtins\neval", "pickle\nloads"),
        *("torch\nload", "torch\nfloat32.__class__", "torch\n_not_imported"),
    ],
)
def test_open_refuses_every_name_that_is_not_on_the_list(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__getattr__", pytest.fail)  # it imports what it is asked for
    (tmp_path / ".metadata").write_bytes(b"c" + name.encode() + b"\n.")
    assert _error(tmp_path).code == "unsafe_pickle"


def test_read_runs_nothing_of_a_hostile_chunk(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(2))
        writer.write_object("y", Hostile(canary))
        tensor, hostile = writer.items
        place = {"start": hostile.start, "length_bytes": hostile.length_bytes}
        writer.items[:] = [replace(tensor, **place)]
    with pytest.raises(NemotronError, match="does not load"):
        TorchDistReader(tmp_path).read("x")
    assert not canary.exists()


def test_open_names_a_truncated_file(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    file = tmp_path / "c" / "__0_0.distcp"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    error = _error(tmp_path / "c")
    assert error.code == "artifact_damaged"
    assert error.where == str(file)


def test_open_names_a_missing_file(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    (tmp_path / "c" / "__0_0.distcp").unlink()
    assert "__0_0.distcp: the file is missing" in _error(tmp_path / "c").problem


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_open_refuses_metadata_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    error = _error(tmp_path)
    assert error.code == "artifact_damaged"
    assert ".metadata" in error.problem


def test_open_refuses_files_outside_of_the_directory(tmp_path: Path) -> None:
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(2))
        writer.items[:] = [replace(writer.items[0], file="../other.distcp")]
    assert "points outside" in _error(tmp_path).problem


def test_open_refuses_a_chunk_without_a_place(tmp_path: Path) -> None:
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(2))
    with (tmp_path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)  # noqa: S301 - written above
    metadata.storage_data.clear()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "contradicts itself" in _error(tmp_path).problem


def test_read_refuses_chunks_that_do_not_cover_the_slice(tmp_path: Path) -> None:
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(2, 2), global_shape=(3, 2))
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("x", [slice(0, 2)]), torch.zeros(2, 2))
    with pytest.raises(NemotronError, match="do not cover"):
        reader.read("x")


def test_read_refuses_a_chunk_of_another_shape(tmp_path: Path) -> None:
    with torch_dist_writer(tmp_path) as writer:
        writer.write("x", torch.zeros(2, 2))
        writer.write("y", torch.zeros(4))
        x, y = writer.items
        writer.items[0] = replace(x, start=y.start, length_bytes=y.length_bytes)
    with pytest.raises(NemotronError, match=r"is not what \.metadata says"):
        TorchDistReader(tmp_path).read("x")
