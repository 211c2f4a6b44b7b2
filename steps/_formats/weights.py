"""What all checkpoint formats have in common: weights by Hugging Face name, one tensor at a time.

Converting, merging and fingerprinting are written against this protocol. So they work the same on a
Hugging Face directory, on a Megatron checkpoint and on a base with an adapter merged into it, and
hold only a block of each tensor that they are working on.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._models.config import DecoderConfig

# Names that safetensors gives to the types a model may have, widest first.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PROGRESS_SECONDS = 5.0
_ELEMENTS_AT_A_TIME = 1 << 18  # per block: small enough for a core's cache, even as fp32


class Weights(Protocol):
    """The weights of one model; a tied ``lm_head.weight`` is not among them."""

    @property
    def config(self) -> DecoderConfig:
        """Sizes of the model."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names, in the order of the model."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor, contiguous and on the CPU."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor as blocks of its rows, in order; see ``row_blocks``.

        A block may be overwritten when the next one is asked for.
        """
        ...


def row_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's rows in order, at least one block, as views that fit in a core's cache.

    A block that is made, hashed and written before the next one does not go through main memory.
    """
    if tensor.dim() == 0:
        yield tensor
        return
    yield from tensor.split(rows_of_a_block(math.prod(tensor.shape[1:])))


def rows_of_a_block(row_elements: int) -> int:
    """Return how many rows a block has, given the elements of a row."""
    return max(1, _ELEMENTS_AT_A_TIME // max(1, row_elements))


def size_bytes(weights: Weights, name: str) -> int:
    """Return the size of one tensor, without reading it."""
    return math.prod(weights.shape(name)) * weights.dtype(name).itemsize


def check_block(name: str, block: Tensor, *, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Check that a block has the type and the shape of a tensor's rows; the tensor may be stacked.

    Raises:
        ValueError: It is of another type, or its rows are of another shape.
    """
    inner = tuple(block.shape[1:])
    if block.dtype != dtype or inner != tuple(shape[len(shape) - len(inner) :]):
        raise _not_as_announced(name)


def check_bytes(name: str, num_bytes: int, *, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Check that the blocks of a tensor had as many bytes as the tensor.

    Raises:
        ValueError: They had more or fewer.
    """
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise _not_as_announced(name)


def _not_as_announced(name: str) -> ValueError:
    return ValueError(f"{name} is not of the shape and type announced")


class ReportedWeights:
    """Weights that print a line of progress to stderr every few seconds; see ``Weights``.

    Args:
        weights: The weights that are read.
        label: Start of the lines, which says what they are read for.
    """

    def __init__(self, weights: Weights, label: str) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        self._weights = weights
        self._label = label
        self._num_read = 0
        self._last = monotonic()

    def read(self, name: str) -> Tensor:
        self._report()
        return self._weights.read(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        self._report()
        return self._weights.blocks(name)

    def _report(self) -> None:
        self._num_read += 1
        if monotonic() - self._last > _PROGRESS_SECONDS:
            self._last = monotonic()
            done = f"{self._num_read}/{len(self.names)} tensors"
            print(f"{self._label}: {done}", file=sys.stderr, flush=True)


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor an infinity.

    A sum is finite only if all of its terms are, and takes a twentieth of the time of
    torch.isfinite. A sum that is not finite may only have overflowed: then the smallest and the
    largest value tell, which are NaN if any value is.
    """
    if tensor.sum().isfinite():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def check_names(got: Iterable[str], wanted: Iterable[str], *, where: str) -> None:
    """Check that a checkpoint holds exactly the tensors of its model.

    Raises:
        NemotronError: ``weights_incomplete`` or ``weights_unexpected``, naming the first such
            tensor and the closest name on the other side.
    """
    got, wanted = list(got), list(wanted)
    missing = sorted(set(wanted) - set(got))
    unexpected = sorted(set(got) - set(wanted))
    if missing:
        code, first, others = "weights_incomplete", missing[0], unexpected
        problem = f"missing tensors of the model: {len(missing)}, first {first}"
    elif unexpected:
        code, first, others = "weights_unexpected", unexpected[0], wanted
        problem = f"tensors that are not the model's: {len(unexpected)}, first {first}"
    else:
        return
    close = get_close_matches(first, others, n=1)
    raise NemotronError(
        code,
        problem + (f" (closest: {close[0]})" if close else ""),
        where=where,
        why="the weights do not belong to the model that the config describes",
        fix="use a checkpoint whose config.json and weights belong together",
        exit_code=ExitCode.DATA,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        NemotronError: ``artifact_damaged``.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object")
    return value


def pickled_weights(directory: Path, problem: str, script: str) -> NemotronError:
    """Return the error of a directory whose weights are pickles, with a command to convert it.

    Args:
        directory: The directory.
        problem: What is wrong.
        script: Python code that converts the directory in its first argument into the second.
    """
    target = directory.with_name(f"{directory.name}-safetensors")
    command = shlex.join(["python", "-c", script, str(directory), str(target)])
    return NemotronError(
        "pickled_weights",
        f"{problem} and no safetensors",
        where=str(directory),
        why="loading a pickle can run code, so pickles are not read",
        fix=f"if you trust it, convert it: {command}",
        exit_code=ExitCode.DATA,
    )


def damaged(path: object, problem: str) -> NemotronError:
    """Return the error of a checkpoint file that is not as it was written."""
    return NemotronError(
        "artifact_damaged",
        f"{path}: {problem}",
        where=str(path),
        why="a file was truncated or changed after it was written",
        fix="copy or create the checkpoint again",
        exit_code=ExitCode.DATA,
    )
