"""Opening an adapter together with its base: both are found, verified and checked for a match.

``convert/merge_lora`` and ``nemotron adapter`` open their inputs here, so that what is verified is
what is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.artifacts import (
    MANIFEST,
    Artifact,
    Input,
    describe_input,
    read_artifact,
    verify_files,
)
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.adapter import ADAPTER_CONFIG
from nemotron.steps._formats.any_adapter import (
    find_any_adapter,
    open_any_adapter,
    read_adapter_record,
)
from nemotron.steps._formats.fingerprint import FingerprintedWeights, base_fingerprint
from nemotron.steps._formats.huggingface import (
    HuggingFaceCheckpoint,
    describes,
    tokenizer_blake3,
)
from nemotron.steps._formats.lora import LoraAdapter, adapter_error
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron, read_run_config
from nemotron.steps._formats.weights import ReportedWeights, Weights, read_json

_BASES = ("checkpoint_megatron", "checkpoint_hf")


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that has passed all checks.

    Attributes:
        adapter: The adapter.
        record: Its ``artifact.json``, files verified; None if it has none.
        base_path: Directory of the base.
        base: The base's weights.
        model_files: Directory with the base's config and tokenizer; None if there is none.
        lineage: Adapter and base, for the ``artifact.json`` of what is made from them.
    """

    adapter: LoraAdapter
    record: Artifact | None
    base_path: Path
    base: FingerprintedWeights
    model_files: Path | None
    lineage: tuple[Input, Input]

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The properties in the adapter's ``artifact.json``; empty if it has none."""
        return _recorded(self.record)

    @property
    def layout(self) -> str:
        """``peft`` or ``megatron_bridge``."""
        is_peft = (self.adapter.directory / ADAPTER_CONFIG).is_file()
        return "peft" if is_peft else "megatron_bridge"

    @property
    def is_base_verified(self) -> bool:
        """Whether the base is known to be the one that the adapter was trained on."""
        return _records_base(self.record)

    @property
    def is_validated(self) -> bool:
        """Whether the adapter has a held-out loss; see ``_is_validated``."""
        return _is_validated(self.record)


@dataclass(frozen=True)
class _Base:
    artifact_type: str
    weights: Weights
    root: Path
    model_files: Path | None
    artifact: Artifact | None


def open_with_base(
    path: Path,
    *,
    base: Path | None,
    is_megatron_base: bool | None = None,
    model_files: Path | None = None,
    base_digests: bool = True,
    allow_unverified_base: bool = True,
    allow_unvalidated: bool = True,
) -> OpenedAdapter:
    """Return the adapter at ``path`` and its base after all checks; nothing is written.

    Args:
        path: Adapter directory of PEFT, checkpoint of Megatron-Bridge, or a root of either.
        base: Base checkpoint of either format; None for the one that the adapter records.
        is_megatron_base: Whether the base is a Megatron checkpoint; None: yes if it has no
            ``config.json``.
        model_files: Directory with config and tokenizer; None for the base's own.
        base_digests: Verify the digests of the base's files, not only their sizes.
        allow_unverified_base: Accept an adapter that does not record its base.
        allow_unvalidated: Accept an adapter without a held-out loss.

    Raises:
        NemotronError: ``adapter_missing``, ``base_missing``, ``base_model_mismatch``,
            ``adapter_not_validated``, ``artifact_damaged``, and what opening adapter and base
            raises.
    """
    directory, record = _find(path)
    if not allow_unvalidated and not _is_validated(record):
        raise _not_validated(directory)
    if not allow_unverified_base and not _records_base(record):
        problem = f"{directory} does not record the fingerprint of its base"
        raise _other_base(problem, directory)
    base_path = base or _recorded_base(directory, record)
    if base_path is None:
        raise _base_missing(directory)
    if is_megatron_base is None:
        is_megatron_base = not (base_path / "config.json").is_file()
    opened = _open_base(base_path, is_megatron=is_megatron_base, digests=base_digests)
    files = model_files or opened.model_files
    if files is not None:
        _check_model_files(directory, record, files, opened.weights)
    fingerprint = _check_fingerprint(directory, record, opened, base_path)
    return OpenedAdapter(
        adapter=open_any_adapter(directory, config=opened.weights.config),
        record=record,
        base_path=base_path,
        base=FingerprintedWeights(opened.weights, fingerprint),
        model_files=files,
        lineage=(
            describe_input("checkpoint_lora", directory),
            describe_input(opened.artifact_type, opened.root),
        ),
    )


def _find(path: Path) -> tuple[Path, Artifact | None]:
    """Return the directory of the adapter at ``path`` and its record, files verified."""
    directory = find_any_adapter(path)
    if directory is None:
        problem = f"{path} has neither PEFT's nor Megatron-Bridge's adapter files"
        raise adapter_error("missing", path, problem)
    return directory, read_adapter_record(directory)


def _recorded(record: Artifact | None) -> Mapping[str, Any]:
    return record.properties if record else {}


def _records_base(record: Artifact | None) -> bool:
    return _recorded(record).get("base_fingerprint") is not None


def _is_validated(record: Artifact | None) -> bool:
    """Return whether an adapter has a held-out loss, or comes from a trainer that records none.

    Other trainers, and an export of their adapters, record neither a base nor a loss.
    """
    recorded = _recorded(record)
    is_foreign = recorded.keys().isdisjoint({"base_fingerprint", "valid_loss"})
    return is_foreign or recorded.get("valid_loss") is not None


def _recorded_base(directory: Path, record: Artifact | None) -> Path | None:
    """Return the base that an adapter says it was trained on, if that is a directory here."""
    inputs = record.inputs if record else ()
    names = [each.path for each in inputs if each.type in _BASES]
    if (directory / ADAPTER_CONFIG).is_file():
        names.append(read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    else:
        checkpoint = read_run_config(directory).get("checkpoint") or {}
        names.append(checkpoint.get("pretrained_checkpoint") or "")
    return next((Path(name) for name in names if name and Path(name).is_dir()), None)


def _open_base(path: Path, *, is_megatron: bool, digests: bool) -> _Base:
    if is_megatron:
        checkpoint = open_megatron(path)
        if checkpoint.artifact is not None:
            verify_files(checkpoint.root, checkpoint.artifact, digests=digests)
        weights = MegatronWeights(checkpoint)
        files, artifact = checkpoint.hf_dir, checkpoint.artifact
        return _Base("checkpoint_megatron", weights, checkpoint.root, files, artifact)
    artifact = read_artifact(path, "checkpoint_hf") if (path / MANIFEST).is_file() else None
    if artifact is not None:
        verify_files(path, artifact, digests=digests)
    return _Base("checkpoint_hf", HuggingFaceCheckpoint(path), path, path, artifact)


def _check_model_files(
    directory: Path, record: Artifact | None, files: Path, weights: Weights
) -> None:
    """Check that ``files`` describe the base and have the tokenizer that the adapter records."""
    if not describes(files, weights.config):
        raise _other_base(f"{files}/config.json describes a different model than the base", files)
    wanted, got = _recorded(record).get("tokenizer_blake3"), tokenizer_blake3(files)
    if wanted is not None and got is not None and got != wanted:
        problem = f"{files}/tokenizer.json is not the tokenizer that {directory} was trained with"
        raise _other_base(problem, files)


def _check_fingerprint(
    directory: Path, record: Artifact | None, opened: _Base, base_path: Path
) -> str | None:
    """Check the base's fingerprint against the recorded one; return it, or None if not computed."""
    # The files of a base with a manifest were verified, so the fingerprint in it is right.
    got = opened.artifact.properties.get("base_fingerprint") if opened.artifact else None
    wanted = _recorded(record).get("base_fingerprint")
    if wanted is None:
        return got
    if got is None:
        got = base_fingerprint(ReportedWeights(opened.weights, f"fingerprint of {base_path}"))
    if got != wanted:
        problem = (
            f"{base_path} has fingerprint {got[:16]}; {directory} was trained on {wanted[:16]}"
        )
        raise _other_base(problem, base_path)
    return got


def _base_missing(directory: Path) -> NemotronError:
    return NemotronError(
        "base_missing",
        f"{directory} records no base that is a directory here",
        where=str(directory),
        fix="pass --base DIR, the base it was trained on, Megatron or Hugging Face",
    )


def _other_base(problem: str, where: Path) -> NemotronError:
    return NemotronError(
        "base_model_mismatch",
        problem,
        where=str(where),
        fix="pass --base DIR, the base it was trained on",
        exit_code=ExitCode.DATA,
    )


def _not_validated(directory: Path) -> NemotronError:
    return NemotronError(
        "adapter_not_validated",
        f"{directory}: valid_loss in artifact.json is null",
        where=str(directory),
        fix="train with a validation split",
        exit_code=ExitCode.DATA,
    )
