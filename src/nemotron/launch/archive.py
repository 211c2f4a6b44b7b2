"""The code that a remote job runs: the installed package as one archive, the same bytes every time.

The archive is made from the package that runs here, whether from a checkout or a wheel, and links
are followed. So a job runs what its user has on disk, uncommitted changes included.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nemotron

_LEFT_OUT_SUFFIXES = (".pyc", ".pyo")
_LEFT_OUT_DIRECTORIES = ("__pycache__",)


@dataclass(frozen=True)
class Archive:
    """A ``tar.gz`` whose one top directory is ``nemotron``; its name holds its digest."""

    name: str
    content: bytes
    sha256: str


def pack_code(package: Path | None = None, *, left_out: Sequence[str] = ()) -> Archive:
    """Return the package as an archive; the same files give the same bytes.

    Args:
        package: Directory of the package; the running one by default.
        left_out: Directories not to ship, relative to the package, such as ``steps/_tiny``.
    """
    package = package or Path(nemotron.__file__).parent
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in _files(package, frozenset(left_out)):
            entry = tarfile.TarInfo(f"nemotron/{path.relative_to(package).as_posix()}")
            content = path.read_bytes()
            entry.size = len(content)
            entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
            archive.addfile(entry, io.BytesIO(content))
    content = gzip.compress(raw.getvalue(), mtime=0)
    digest = hashlib.sha256(content).hexdigest()
    return Archive(f"nemotron-{nemotron.__version__}-{digest[:12]}.tar.gz", content, digest)


def _files(package: Path, left_out: frozenset[str]) -> Iterator[Path]:
    for directory, names, files in os.walk(package, followlinks=True):
        here = Path(directory)
        names[:] = sorted(
            name
            for name in names
            if name not in _LEFT_OUT_DIRECTORIES
            and (here / name).relative_to(package).as_posix() not in left_out
        )
        for name in sorted(files):
            # Editors leave links to nowhere beside a file that is open.
            if not name.endswith(_LEFT_OUT_SUFFIXES) and (here / name).is_file():
                yield here / name
