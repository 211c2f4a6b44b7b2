"""The inputs of a merge: found, checked for damage, and checked against each other."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from nemotron.artifacts import (
    MANIFEST,
    Artifact,
    Input,
    describe_input,
    read_artifact,
    verify_files,
)
from nemotron.steps._entry import step_error
from nemotron.steps._formats.any_adapter import (
    find_any_adapter,
    open_any_adapter,
    read_adapter_record,
)
from nemotron.steps._formats.fingerprint import FingerprintedWeights, base_fingerprint
from nemotron.steps._formats.huggingface import (
    CHAT_TEMPLATE,
    HuggingFaceCheckpoint,
    describes,
    read_chat_template,
    tokenizer_blake3,
)
from nemotron.steps._formats.lora import LoraAdapter
from nemotron.steps._formats.megatron import MegatronWeights, open_megatron
from nemotron.steps._formats.weights import ReportedWeights, Weights
from nemotron.steps.convert.merge_lora.checks import ID


@dataclass(frozen=True)
class MergeInputs:
    """What a merge needs, after all checks.

    Args:
        adapter: The adapter.
        base: The weights it was trained on.
        base_path: Where they lie.
        model_files: Directory that config, generation config and tokenizer come from.
        chat_template: Template that the adapter was trained with where it is not the one in
            ``model_files``; None otherwise.
        lineage: Goes into the output's ``artifact.json``.
    """

    adapter: LoraAdapter
    base: FingerprintedWeights
    base_path: Path
    model_files: Path
    chat_template: str | None
    lineage: tuple[Input, ...]


@dataclass(frozen=True)
class _Base:
    weights: Weights
    model_files: Path | None
    artifact: Artifact | None
    lineage: Input


def open_inputs(
    *,
    lora_checkpoint: Path,
    base: Path | None,
    is_megatron_base: bool,
    model_files: Path | None,
    allow_unverified_base: bool,
    allow_unvalidated: bool,
) -> MergeInputs:
    """Return the inputs of a merge, checked; nothing has been written when this fails.

    Args:
        lora_checkpoint: Adapter directory of PEFT or checkpoint of Megatron-Bridge, or a directory
            whose tracker names one.
        base: Base checkpoint.
        is_megatron_base: Whether ``base`` is a Megatron checkpoint.
        model_files: Where config and tokenizer come from; the base by default.
        allow_unverified_base: Accept an adapter that does not record its base.
        allow_unvalidated: Accept an adapter without a held-out loss.

    Raises:
        NemotronError: ``missing_adapter``, ``missing_base_checkpoint``, ``base_model_mismatch``,
            ``adapter_not_validated``, ``artifact_damaged``, and what opening adapter and base
            raises.
    """
    adapter_dir = find_any_adapter(lora_checkpoint)
    if adapter_dir is None:
        problem = f"neither PEFT's nor Megatron-Bridge's adapter files are at {lora_checkpoint}"
        raise step_error(ID, "missing_adapter", problem, where="lora_checkpoint")
    if base is None or not base.is_dir():
        raise step_error(ID, "missing_base_checkpoint", f"{base} does not exist")
    record = read_adapter_record(adapter_dir)
    _check_validated(adapter_dir, record, allow_unvalidated=allow_unvalidated)
    opened = _open_megatron_base(base) if is_megatron_base else _open_hf_base(base)
    files = model_files or opened.model_files
    if files is None:
        problem = f"{base} carries no config and tokenizer; set hf_model_path to the source model"
        raise step_error(ID, "missing_base_checkpoint", problem, where="hf_model_path")
    if not describes(files, opened.weights.config):
        problem = f"{files}/config.json describes another model than the base"
        raise step_error(ID, "base_model_mismatch", problem, where=str(files))
    fingerprint = _check_base(
        adapter_dir, record, opened, base=base, allow_unverified_base=allow_unverified_base
    )
    _check_tokenizer(adapter_dir, record, files)
    return MergeInputs(
        adapter=open_any_adapter(adapter_dir, config=opened.weights.config),
        base=FingerprintedWeights(opened.weights, fingerprint),
        base_path=base,
        model_files=files,
        chat_template=_other_chat_template(adapter_dir, record, files),
        lineage=(describe_input("checkpoint_lora", adapter_dir), opened.lineage),
    )


def _open_hf_base(path: Path) -> _Base:
    artifact = read_artifact(path, "checkpoint_hf") if (path / MANIFEST).is_file() else None
    if artifact is not None:
        verify_files(path, artifact)
    weights = HuggingFaceCheckpoint(path)
    return _Base(weights, path, artifact, describe_input("checkpoint_hf", path))


def _open_megatron_base(path: Path) -> _Base:
    checkpoint = open_megatron(path)
    if checkpoint.artifact is not None:
        verify_files(checkpoint.root, checkpoint.artifact)
    lineage = describe_input("checkpoint_megatron", checkpoint.root)
    return _Base(MegatronWeights(checkpoint), checkpoint.hf_dir, checkpoint.artifact, lineage)


def _check_validated(
    adapter_dir: Path, record: Artifact | None, *, allow_unvalidated: bool
) -> None:
    if record is None or allow_unvalidated:
        return
    # An adapter of others that was exported says as little as before: see _check_base.
    is_of_others = record.properties.keys().isdisjoint({"base_fingerprint", "valid_loss"})
    if not is_of_others and record.properties.get("valid_loss") is None:
        problem = f"{adapter_dir}: valid_loss in artifact.json is null"
        raise step_error(ID, "adapter_not_validated", problem, where=str(adapter_dir))


def _check_base(
    adapter_dir: Path,
    record: Artifact | None,
    opened: _Base,
    *,
    base: Path,
    allow_unverified_base: bool,
) -> str | None:
    """Return the base's fingerprint as far as it is known, checked against the recorded one."""
    wanted = record.properties.get("base_fingerprint") if record else None
    if wanted is None and not allow_unverified_base:
        problem = f"{adapter_dir} does not record the fingerprint of its base"
        raise step_error(ID, "base_model_mismatch", problem, where=str(adapter_dir))
    # A base with a manifest has just been verified file by file, so its word is good.
    got = opened.artifact.properties.get("base_fingerprint") if opened.artifact else None
    if wanted is None:
        print(
            f"warning: {adapter_dir} does not record its base: whether it is {base} is not checked",
            file=sys.stderr,
        )
        return got
    if got is None:
        got = base_fingerprint(ReportedWeights(opened.weights, f"fingerprint of {base}"))
    if got != wanted:
        problem = f"{base} has fingerprint {got[:16]}; {adapter_dir} was trained on {wanted[:16]}"
        raise step_error(ID, "base_model_mismatch", problem, where=str(base))
    return got


def _check_tokenizer(adapter_dir: Path, record: Artifact | None, model_files: Path) -> None:
    wanted = record.properties.get("tokenizer_blake3") if record else None
    got = tokenizer_blake3(model_files)
    if wanted is not None and got is not None and got != wanted:
        problem = f"{model_files}/tokenizer.json is not what {adapter_dir} was trained with"
        raise step_error(ID, "base_model_mismatch", problem, where=str(model_files))


def _other_chat_template(
    adapter_dir: Path, record: Artifact | None, model_files: Path
) -> str | None:
    """Return the adapter's chat template where it is not the base's own.

    A model answers as trained only under the template that it was trained with.
    """
    wanted = record.properties.get("chat_template_sha256") if record else None
    if wanted is None or _sha256_text(read_chat_template(model_files)) == wanted:
        return None
    template = read_chat_template(adapter_dir)
    if _sha256_text(template) == wanted:
        return template
    print(
        f"warning: {adapter_dir} was trained with another chat template than that of {model_files} "
        f"and carries no {CHAT_TEMPLATE}; the output gets the base's",
        file=sys.stderr,
    )
    return None


def _sha256_text(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
