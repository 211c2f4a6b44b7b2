"""Our safetensors reader and writer against the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.safetensors_file import SafetensorsFile, write_safetensors
from nemotron.steps._formats.weights import DTYPES


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(3, 5, generator=generator).to(dtype) for name, dtype in DTYPES.items()
    }
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def _write(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    write_safetensors(
        path,
        names=list(tensors),
        shape=lambda name: tuple(tensors[name].shape),
        dtype=lambda name: tensors[name].dtype,
        blocks=lambda name: [tensors[name]],
        **options,
    )


def _header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_read_gives_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "who": "me"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "who": "me"}
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.dtype(name) == tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = _tensors()
    _write(tmp_path / "a.safetensors", tensors, metadata={"who": "me"})
    again = load_file(tmp_path / "a.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_write_aligns_every_tensor_to_its_own_width(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3).half(), "b": torch.zeros(3, dtype=torch.float64)}
    _write(tmp_path / "a.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name, entry in file.entries.items():
        assert entry.start % tensors[name].element_size() == 0


def test_write_takes_views_that_are_not_contiguous(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(12.0).reshape(3, 4).T}
    _write(tmp_path / "a.safetensors", tensors)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], tensors["x"])


@pytest.mark.parametrize(
    "blocks",
    [
        [torch.zeros(2, 4)],
        [torch.zeros(2, 3)],
        [torch.zeros(3, 3), torch.zeros(0, 3), torch.zeros(2, 3)],
        [torch.zeros(4, 3, dtype=torch.float64)],
        [torch.zeros(2, 3), torch.zeros(2, 3).half()],
        [],
    ],
)
def test_write_refuses_a_tensor_other_than_announced(tmp_path: Path, blocks: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="x is not of the shape and type announced"):
        write_safetensors(
            tmp_path / "a.safetensors",
            names=["x"],
            shape=lambda _: (4, 3),
            dtype=lambda _: torch.float32,
            blocks=lambda _: blocks,
        )


@pytest.mark.parametrize("num_bytes", [0, 5, 40, -1])
def test_open_names_a_truncated_file(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, _tensors())
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(NemotronError, match=r"a\.safetensors") as caught:
        SafetensorsFile(path)
    assert (caught.value.code, caught.value.exit_code) == ("artifact_damaged", ExitCode.DATA)


def test_open_refuses_bytes_after_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _write(path, _tensors())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(NemotronError, match="its header says"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not JSON"),
        (b"[]", "not JSON"),
        (json.dumps({"x": {"dtype": "F32", "shape": [2]}}).encode(), "entry for x does not parse"),
        (
            json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
            "entry for x contradicts itself",
        ),
        (
            json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(),
            "entry for x contradicts itself",
        ),
    ],
)
def test_open_refuses_a_header_that_makes_no_sense(
    tmp_path: Path, header: bytes, message: str
) -> None:
    _header(tmp_path / "a.safetensors", header, b"1234")
    with pytest.raises(NemotronError, match=message):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_read_refuses_types_that_no_model_has(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with pytest.raises(NemotronError, match="x is I32; wanted one of") as caught:
        SafetensorsFile(tmp_path / "a.safetensors").read("x")
    assert caught.value.code == "weights_dtype"


@pytest.mark.parametrize("num_at_a_time", [1, 3])
def test_a_block_may_go_once_the_next_is_asked_for_and_few_tensors_are_written_at_a_time(
    tmp_path: Path, num_at_a_time: int
) -> None:
    shapes = {str(number): (number % 7 + 1, 100) for number in range(30)}
    held, sums = WeakSet[Tensor](), []

    def blocks(name: str) -> Iterator[Tensor]:
        block = torch.empty(1, 100)
        held.add(block)
        for row in range(shapes[name][0]):
            sums.append(len(held))
            yield block.fill_(100 * int(name) + row)

    write_safetensors(
        tmp_path / "a.safetensors",
        names=list(shapes),
        shape=shapes.__getitem__,
        dtype=lambda _: torch.float32,
        blocks=blocks,
        num_at_a_time=num_at_a_time,
    )
    assert max(sums) <= num_at_a_time + 1  # one of them may not have been collected yet
    written = load_file(tmp_path / "a.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == shapes
    for name, tensor in written.items():
        rows = torch.arange(len(tensor)) + 100 * int(name)
        assert torch.equal(tensor, rows[:, None].expand(-1, 100).float())


def test_what_fails_to_be_read_is_the_error_of_the_writer(tmp_path: Path) -> None:
    tensors = _tensors()
    names = list(tensors)
    with pytest.raises(KeyError, match="gone"):
        write_safetensors(
            tmp_path / "a.safetensors",
            names=[*names, "gone"],
            shape=lambda name: tuple(tensors.get(name, torch.empty(0)).shape),
            dtype=lambda name: tensors.get(name, torch.empty(0)).dtype,
            blocks=lambda name: [tensors[name]],
        )
