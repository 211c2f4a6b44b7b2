"""An adapter with the base it belongs to, both found and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemotron.artifacts import MANIFEST, Artifact, read_artifact, verify_files
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.adapter import ADAPTER_CONFIG
from nemotron.steps._formats.any_adapter import (
    find_any_adapter,
    open_any_adapter,
    read_adapter_record,
)
from nemotron.steps._formats.fingerprint import base_fingerprint
from nemotron.steps._formats.huggingface import HuggingFaceCheckpoint, read_json
from nemotron.steps._formats.lora import LoraAdapter, adapter_error
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron, read_run_config
from nemotron.steps._formats.weights import ReportedWeights, Weights

_BASES = ("checkpoint_megatron", "checkpoint_hf")


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter after all checks.

    Attributes:
        adapter: The adapter.
        record: Its ``artifact.json``, files verified; None where it has none.
        base_path: The base.
        base: The base's weights.
        is_base_verified: Whether the base is the one that the adapter records.
    """

    adapter: LoraAdapter
    record: Artifact | None
    base_path: Path
    base: Weights
    is_base_verified: bool

    @property
    def base_type(self) -> str:
        """Artifact type of the base."""
        return _BASES[(self.base_path / "config.json").is_file()]

    @property
    def layout(self) -> str:
        """``peft`` or ``megatron_bridge``."""
        is_peft = (self.adapter.directory / ADAPTER_CONFIG).is_file()
        return "peft" if is_peft else "megatron_bridge"


def open_with_base(path: Path, *, base: Path | None) -> OpenedAdapter:
    """Return the adapter at ``path`` after every check that a merge makes.

    Args:
        path: Adapter directory of PEFT, checkpoint of Megatron-Bridge, or a root of either.
        base: Base checkpoint of either format; None: the one that the adapter records.

    Raises:
        NemotronError: ``adapter_missing``, ``base_missing``, ``base_model_mismatch``,
            ``artifact_damaged``, and what opening adapter and base raises.
    """
    directory = find_any_adapter(path)
    if directory is None:
        problem = f"neither PEFT's nor Megatron-Bridge's adapter files are at {path}"
        raise adapter_error("missing", path, problem)
    record = read_adapter_record(directory)
    base_path = base or _recorded_base(directory, record)
    if base_path is None:
        raise _base_missing(directory)
    weights, fingerprint = _open_base(base_path)
    wanted = record.properties.get("base_fingerprint") if record else None
    if wanted is not None:
        got = fingerprint or base_fingerprint(ReportedWeights(weights, f"reading {base_path}"))
        if got != wanted:
            raise _other_base(directory, base_path, got=got, wanted=wanted)
    adapter = open_any_adapter(directory, config=weights.config)
    return OpenedAdapter(adapter, record, base_path, weights, wanted is not None)


def _recorded_base(directory: Path, record: Artifact | None) -> Path | None:
    """Return the base that an adapter says it was trained on, where that is a directory here."""
    inputs = record.inputs if record else ()
    names = [each.path for each in inputs if each.type in _BASES]
    if (directory / ADAPTER_CONFIG).is_file():
        names.append(read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    else:
        checkpoint = read_run_config(directory).get("checkpoint") or {}
        names.append(checkpoint.get("pretrained_checkpoint") or "")
    return next((Path(name) for name in names if name and Path(name).is_dir()), None)


def _open_base(path: Path) -> tuple[Weights, str | None]:
    """Return the weights of a base and the fingerprint that its own ``artifact.json`` gives."""
    if (path / "config.json").is_file():
        artifact = read_artifact(path, "checkpoint_hf") if (path / MANIFEST).is_file() else None
        root, weights = path, HuggingFaceCheckpoint(path)
    else:
        checkpoint = open_megatron(path)
        artifact, root, weights = checkpoint.artifact, checkpoint.root, MegatronWeights(checkpoint)
    if artifact is None:
        return weights, None
    verify_files(root, artifact, digests=False)
    return weights, artifact.properties.get("base_fingerprint")


def _base_missing(directory: Path) -> NemotronError:
    return NemotronError(
        "base_missing",
        f"the base that {directory} records is not a directory here",
        where=str(directory),
        fix="pass --base DIR, the base it was trained on, Megatron or Hugging Face",
    )


def _other_base(directory: Path, base: Path, *, got: str, wanted: str) -> NemotronError:
    return NemotronError(
        "base_model_mismatch",
        f"{base} has fingerprint {got[:16]}; {directory} was trained on {wanted[:16]}",
        where=str(base),
        fix="pass --base DIR, the base it was trained on",
        exit_code=ExitCode.DATA,
    )
