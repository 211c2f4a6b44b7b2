"""The inputs of a merge, opened and checked, and the chat template that its output gets."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron.artifacts import Input
from nemotron.errors import NemotronError
from nemotron.steps._adapter.opening import OpenedAdapter, open_with_base
from nemotron.steps._entry import step_error
from nemotron.steps._formats.any_adapter import find_any_adapter
from nemotron.steps._formats.fingerprint import FingerprintedWeights
from nemotron.steps._formats.huggingface import CHAT_TEMPLATE, read_chat_template
from nemotron.steps._formats.lora import LoraAdapter
from nemotron.steps._formats.megatron import open_megatron
from nemotron.steps.convert.merge_lora.checks import STEP


@dataclass(frozen=True)
class MergeInputs:
    """The inputs of a merge, after all checks.

    Args:
        adapter: The adapter.
        base: The weights it was trained on.
        base_path: Directory of the base.
        model_files: Directory that config, generation config and tokenizer come from.
        chat_template: Template that the adapter was trained with, if it is not the one in
            ``model_files``; None otherwise.
        lineage: Inputs that the output's ``artifact.json`` names.
    """

    adapter: LoraAdapter
    base: FingerprintedWeights
    base_path: Path
    model_files: Path
    chat_template: str | None
    lineage: tuple[Input, ...]


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
        NemotronError: ``missing_adapter``, ``missing_base_checkpoint``, ``missing_model_files``,
            ``base_model_mismatch``, ``adapter_not_validated``, and what ``open_with_base`` raises.
    """
    if find_any_adapter(lora_checkpoint) is None:
        problem = f"{lora_checkpoint} has neither PEFT's nor Megatron-Bridge's adapter files"
        raise step_error(STEP, "missing_adapter", problem, where="lora_checkpoint")
    if base is None or not base.is_dir():
        raise step_error(STEP, "missing_base_checkpoint", f"{base} does not exist")
    files = model_files or _own_model_files(base, is_megatron=is_megatron_base)
    with _named_as_in_the_manifest():
        opened = open_with_base(
            lora_checkpoint,
            base=base,
            is_megatron_base=is_megatron_base,
            model_files=files,
            allow_unverified_base=allow_unverified_base,
            allow_unvalidated=allow_unvalidated,
        )
    if not opened.is_base_verified:
        print(
            f"warning: {opened.adapter.directory} does not record its base: whether that is {base} "
            "was not checked",
            file=sys.stderr,
        )
    return MergeInputs(
        adapter=opened.adapter,
        base=opened.base,
        base_path=base,
        model_files=files,
        chat_template=_other_chat_template(opened, files),
        lineage=opened.lineage,
    )


@contextlib.contextmanager
def _named_as_in_the_manifest() -> Iterator[None]:
    """Give errors that the manifest of this step knows its cause and recovery."""
    try:
        yield
    except NemotronError as error:
        if error.code in ("base_model_mismatch", "adapter_not_validated"):
            raise step_error(STEP, error.code, error.problem, where=error.where) from None
        raise


def _own_model_files(base: Path, *, is_megatron: bool) -> Path:
    """Return the directory that has a base's config and tokenizer.

    It is looked for before the base is hashed, which takes minutes if the base is large.
    """
    files = open_megatron(base).hf_dir if is_megatron else base
    if files is None:
        problem = f"{base} has no hf/config.json, and hf_model_path is null"
        raise step_error(STEP, "missing_model_files", problem, where="hf_model_path")
    return files


def _other_chat_template(opened: OpenedAdapter, model_files: Path) -> str | None:
    """Return the adapter's chat template if it is not the base's own.

    A model answers as trained only under the template that it was trained with: the one that the
    adapter records, or, of one that records none, what its trainer saved with it.
    """
    adapter_dir = opened.adapter.directory
    template = read_chat_template(adapter_dir)
    wanted = opened.recorded.get("chat_template_sha256") or _sha256_text(template)
    if wanted is None or _sha256_text(read_chat_template(model_files)) == wanted:
        return None
    if _sha256_text(template) == wanted:
        return template
    print(
        f"warning: {adapter_dir} was trained with a different chat template than {model_files} has "
        f"and has no {CHAT_TEMPLATE} of its own; the output gets the base's",
        file=sys.stderr,
    )
    return None


def _sha256_text(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()
