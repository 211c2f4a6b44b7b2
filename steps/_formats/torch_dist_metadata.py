"""The ``.metadata`` of a DCP directory: which tensors it has, and in which bytes of which file.

The file is a pickle of classes of torch. Our unpickler replaces the dozen classes that such a file
needs by records of our own and refuses every other name. So nothing in the file can run code, not
even torch's, and torch.distributed.checkpoint, whose import takes half a second, is not needed.
torch's own reader unpickles without restrictions.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.weights import damaged

METADATA_FILE = ".metadata"


@dataclass(frozen=True)
class MetadataIndex:
    """Name and offsets of a chunk."""

    fqn: str
    offset: tuple[int, ...] | None = None
    index: int | None = field(default=None, compare=False)


@dataclass
class StorageInfo:
    """Where the bytes of a chunk are."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: list[str] | None = None  # written by newer versions of torch only


@dataclass
class ChunkStorageMetadata:
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class TensorProperties:
    """What is the same for all chunks of a tensor."""

    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]  # the others are deprecated


@dataclass
class TensorStorageMetadata:
    """A tensor."""

    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


@dataclass
class Metadata:
    """The whole content; entries that are no ``TensorStorageMetadata`` are byte items."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[MetadataIndex, StorageInfo]


class _Unused:
    """Stands for everything else in such a file."""

    def __init__(self, *values: object) -> None:
        pass


_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _Unused,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): StorageInfo,
    **{
        (f"{_CHECKPOINT}.metadata", record.__name__): record
        for record in (
            Metadata,
            MetadataIndex,
            TensorStorageMetadata,
            ChunkStorageMetadata,
            TensorProperties,
        )
    },
    **{
        (f"{_CHECKPOINT}.metadata", name): _Unused
        for name in ("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
    },
    **{
        (f"{_CHECKPOINT}.planner", name): _Unused
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
    },
    # torch records the directory of a save as it was given, which may be a path object.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


def read_metadata(path: Path) -> Metadata:
    """Return what a ``.metadata`` file says.

    Raises:
        NemotronError: ``checkpoint_missing`` (no such file), ``artifact_damaged`` (it does not
            parse), ``unsafe_pickle`` (it asks for anything but the classes of a checkpoint).
    """
    if not path.is_file():
        raise NemotronError(
            "checkpoint_missing",
            f"{path.parent} has no .metadata; wanted a torch_dist checkpoint",
            where=str(path.parent),
            fix="pass the directory that a torch_dist checkpoint was saved to",
            exit_code=ExitCode.DATA,
        )
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except _UnsafeNameError as name:
        raise NemotronError(
            "unsafe_pickle",
            f"{path} refers to {name}, which no checkpoint needs",
            where=str(path),
            why="loading it could run code; none was run",
            fix="do not use this checkpoint unless you know who wrote it",
            exit_code=ExitCode.DATA,
        ) from None
    except Exception as error:  # a cut or changed pickle fails in any way it likes
        raise damaged(path, f"it does not unpickle: {error!r}") from None
    if not isinstance(metadata, Metadata):
        raise damaged(path, "it is not the metadata of a torch_dist checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Finds only the classes that a DCP ``.metadata`` consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        found = vars(torch).get(name)  # getattr would import what torch imports when it is asked
        if module == "torch" and isinstance(found, torch.dtype):
            return found
        raise _UnsafeNameError(f"{module}.{name}")


class _UnsafeNameError(Exception):
    pass
