"""Writes files of weights, several at a time, keeps receipts of them, reads back and compares.

A file that is on the disk has a receipt in the ``RESUME_DIR`` of the unfinished checkpoint. When a
killed run is started again, it keeps a file whose bytes are those in its receipt. Everything that
the bytes depend on is part of the key under which ``publish`` keeps the work, so that with a
changed source the work starts over.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from nemotron.artifacts import (
    RESUME_DIR,
    FileEntry,
    Pieces,
    Producer,
    is_as_recorded,
    sha256_json,
    write_text,
)
from nemotron.errors import NemotronError
from nemotron.steps._formats.fingerprint import DigestedWeights, TensorDigests
from nemotron.steps._formats.threads import NUM_AT_A_TIME, in_threads
from nemotron.steps._formats.weights import Weights, damaged

_M_MMAP_THRESHOLD = -3  # of malloc.h
Receipt = dict[str, Any]
Compare = Callable[[Weights], Mapping[str, Any]]


@dataclass(frozen=True)
class Written:
    """What is known of weights that were written.

    Args:
        fingerprint: Fingerprint of the weights as they went to the files.
        checksums: XXH3 of each tensor as it went to its file.
        digests: BLAKE3 of each file, or of its pieces, by path relative to the checkpoint.
    """

    fingerprint: str
    checksums: TensorDigests
    digests: Mapping[str, str | Pieces]


class PassingWeights:
    """Weights on their way to the disk, whose digests are taken as they pass; see ``Weights``.

    Attributes:
        blake3: Digests of the tensors that have passed.
    """

    def __init__(self, weights: Weights) -> None:
        self.config, self.names = weights.config, weights.names
        self.shape, self.dtype = weights.shape, weights.dtype
        # What is read back is compared by XXH3, which is six times as fast as BLAKE3: nobody has
        # had a chance to tamper with it.
        checked = DigestedWeights(weights, xxh3_128)
        self._digested = DigestedWeights(checked)
        self.read = self._digested.read
        self.blake3, self._checksums = self._digested.digests, checked.digests
        self._stopped = Event()

    def blocks(self, name: str) -> Iterator[Tensor]:
        for block in self._digested.blocks(name):
            if self._stopped.is_set():
                raise CancelledError
            yield block

    def stop(self) -> None:
        """Make the next request for a block raise ``CancelledError``."""
        self._stopped.set()

    def receipt(self, names: Iterable[str]) -> Receipt:
        """Return what a file's receipt says of its tensors."""
        names = list(names)
        return {"tensors": self.blake3.entries(names), "checksums": self._checksums.entries(names)}

    def written(self, receipts: Mapping[str, Receipt]) -> Written:
        """Return what is known of all weights, including those in files of an earlier run."""
        for receipt in receipts.values():
            self.blake3.restore(receipt["tensors"])
            self._checksums.restore(receipt["checksums"])
        digests = {file: receipt["blake3"] for file, receipt in receipts.items()}
        return Written(self.blake3.fingerprint(), self._checksums, digests)


def write_files(
    root: Path,
    files: Iterable[str],
    write: Callable[[str], Receipt],
    *,
    stop: Callable[[], None],
) -> dict[str, Receipt]:
    """Write files several at a time and return each one's receipt, in the order of ``files``.

    Args:
        root: The unfinished checkpoint; receipts are kept if it has a ``RESUME_DIR``.
        files: Paths relative to ``root``.
        write: Writes one file to the disk and returns its receipt: plain JSON values, among them
            its ``blake3`` as in ``FileEntry``. Not called for a file that has a receipt already.
        stop: Called if a file fails, so that the others are not written to their end.
    """

    def write_or_find(file: str) -> Receipt:
        found = _find_receipt(root, file)
        if found is not None:
            return found
        text = json.dumps(write(file))
        if (root / RESUME_DIR).is_dir():
            write_text(_receipt_path(root, file), text)
        return json.loads(text)  # as a resumed run finds it: pickle tells equal from same strings

    files = list(files)
    with one_torch_thread():
        receipts = in_threads(write_or_find, files, num_threads=NUM_AT_A_TIME, stop=stop)
    return dict(zip(files, receipts, strict=True))


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch from starting threads of its own, which would compete with ours for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work_key(produced_by: Producer, sources: Iterable[Path]) -> str:
    """Return the digest of everything that the bytes of a conversion depend on.

    That is the code, and every file below ``sources`` by its name, size and time of last change.
    """
    code = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted([*package.glob("_formats/*.py"), *package.glob("_models/*.py")]):
        code.update(path.read_bytes())
    states = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for source in sources
        for path in sorted(source.rglob("*"))
        if path.is_file()
    ]
    return sha256_json([produced_by.model_dump(), code.hexdigest(), torch.__version__, states])


def read_back(
    weights: Weights,
    written: Written,
    *,
    where: Path,
    compare: Compare | None = None,
) -> dict[str, Any]:
    """Read weights that were just written, verify them, and return the result of ``compare``.

    The checksum of each tensor must be that of the tensor that was to be written. To make a fused
    or merged tensor once more and compare all bits would take longer and prove no more.

    Raises:
        NemotronError: ``artifact_damaged``: they are not those that were written; and what
            ``compare`` raises.
    """
    _return_freed_memory()
    reread = DigestedWeights(weights, xxh3_128)
    problem: NemotronError | None = None
    properties: dict[str, Any] = {}
    try:
        properties |= compare(reread) if compare else {}
    except NemotronError as error:
        problem = error
    name = written.checksums.first_difference(reread.all_digests())
    if name is not None:  # the cause, if compare has found a problem as well
        raise damaged(where, f"{name} differs from what was written when read back")
    if problem is not None:
        raise problem
    return properties


def _return_freed_memory() -> None:
    """Return the memory of freed tensors to the kernel: what is allocated next is larger."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc, which otherwise keeps pieces of up to 32 MB
        library.mallopt(_M_MMAP_THRESHOLD, 4_000_000)
        library.malloc_trim(0)


def _find_receipt(root: Path, file: str) -> Receipt | None:
    """Return the receipt of a file, if it has one and its bytes are as the receipt says."""
    try:
        receipt: Receipt = json.loads(_receipt_path(root, file).read_bytes())
        size_bytes = (root / file).stat().st_size
        entry = FileEntry(path=file, size_bytes=size_bytes, blake3=receipt["blake3"])
        return receipt if is_as_recorded(root, entry) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _receipt_path(root: Path, file: str) -> Path:
    return root / RESUME_DIR / f"{Path(file).name}.json"
