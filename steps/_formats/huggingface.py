"""Hugging Face checkpoint directories: safetensors (one file or shards with an index) and config.

Weights are read one tensor at a time. Pickled weights (``.bin``, ``.pt``) are refused:
loading one can run code.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron.artifacts import blake3_file
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.safetensors_file import SafetensorsFile
from nemotron.steps._formats.weights import (
    check_names,
    damaged,
    pickled_weights,
    read_json,
    row_blocks,
)
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.fields import naming
from nemotron.steps._models.layouts import hf_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
# Files, by name or pattern, that transformers and vLLM read for a tokenizer and its templates.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # mistral-common's, as is tekken.json
    "tekken.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_CONFIG_FILES = ("config.json", "generation_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth")


class HuggingFaceCheckpoint:
    """The weights of a Hugging Face directory, checked against its config; see ``Weights``.

    Args:
        directory: The checkpoint.

    Raises:
        NemotronError: ``checkpoint_missing``, ``pickled_weights``, ``artifact_damaged``,
            ``model_unsupported``, ``weights_incomplete``, ``weights_unexpected`` or
            ``weights_shape``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_decoder_config(directory)
        self._files = _index(directory)
        self._tensors = hf_tensors(self.config)
        check_names(self._model_names(), self._tensors, where=str(directory))
        for name, tensor in self._tensors.items():
            got = self._files[name].entries[name].shape
            if got != tensor.shape:
                raise _wrong_shape(self._files[name].path, name, got=got, wanted=tensor.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        return row_blocks(self.read(name))

    def _model_names(self) -> list[str]:
        """Return the names in the files, without tensors that are no weights of the model.

        Old exporters saved the rotary frequencies, which follow from the config, and in a tied
        model a copy of the embedding as ``lm_head.weight``.
        """
        names = [name for name in self._files if not name.endswith(".rotary_emb.inv_freq")]
        if self.config.share_embeddings_and_output_weights and "lm_head.weight" in names:
            embedding = "model.embed_tokens.weight"
            if not torch.equal(self.read("lm_head.weight"), self.read(embedding)):
                raise NemotronError(
                    "weights_unexpected",
                    "tie_word_embeddings is true, but lm_head.weight differs from the embedding",
                    where=str(self._files["lm_head.weight"].path),
                    fix="set tie_word_embeddings to false in config.json, or remove lm_head.weight",
                    exit_code=ExitCode.DATA,
                )
            names.remove("lm_head.weight")
        return names


def read_config(directory: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a Hugging Face directory.

    Raises:
        NemotronError: ``checkpoint_missing`` or ``artifact_damaged``.
    """
    path = directory / "config.json"
    if not path.is_file():
        what = "has no config.json" if directory.is_dir() else "does not exist"
        raise _missing(directory, what)
    return read_json(path)


def read_decoder_config(directory: Path) -> DecoderConfig:
    """Return the sizes that the ``config.json`` of a Hugging Face directory states.

    Raises:
        NemotronError: ``model_unsupported``, and what ``read_config`` raises.
    """
    with naming(directory / "config.json"):
        return DecoderConfig.from_hf(read_config(directory))


def describes(directory: Path, config: DecoderConfig) -> bool:
    """Return whether the ``config.json`` in a directory describes a model of this config.

    ``max_position_embeddings`` is not compared: a run config only has the sequence length of its
    run.
    """
    described = read_decoder_config(directory)
    limit = config.max_position_embeddings
    return dataclasses.replace(described, max_position_embeddings=limit) == config


def copy_model_files(source: Path, target: Path, *, has_tokenizer: bool = True) -> None:
    """Copy config, generation config and, unless told not to, tokenizer and chat template."""
    copy_files(source, target, _CONFIG_FILES + (TOKENIZER_FILES if has_tokenizer else ()))


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy the files that have one of these names or patterns to ``target``, which is created."""
    target.mkdir(parents=True, exist_ok=True)
    for path in (path for name in names for path in source.glob(name) if path.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def tokenizer_blake3(directory: Path) -> str | None:
    """Return the digest of ``tokenizer.json``, or None where the directory has none."""
    path = directory / "tokenizer.json"
    return blake3_file(path) if path.is_file() else None


def read_chat_template(directory: Path) -> str | None:
    """Return the chat template of a model directory, or None where it has none.

    As in transformers, ``chat_template.jinja`` comes before ``tokenizer_config.json``; of several
    named templates it is the one named ``default``.
    """
    if (directory / CHAT_TEMPLATE).is_file():
        return (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
    path = directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def model_properties(directory: Path, config: DecoderConfig, fingerprint: str) -> dict[str, Any]:
    """Return the artifact properties of a model: fingerprint, tokenizer digest, size, type."""
    return {
        "base_fingerprint": fingerprint,
        "tokenizer_blake3": tokenizer_blake3(directory),
        "vocab_size": config.vocab_size,
        "model_type": read_config(directory)["model_type"],
    }


def _index(directory: Path) -> dict[str, SafetensorsFile]:
    """Return the file that holds each tensor."""
    if (directory / WEIGHTS_FILE).is_file():  # before the index, as in transformers
        file = SafetensorsFile(directory / WEIGHTS_FILE)
        return dict.fromkeys(file.entries, file)
    if (directory / INDEX_FILE).is_file():
        return _read_index(directory / INDEX_FILE)
    if any(path for pattern in _PICKLES for path in directory.glob(pattern)):
        raise _pickled(directory)
    raise _missing(directory, f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _read_index(index_path: Path) -> dict[str, SafetensorsFile]:
    directory = index_path.parent
    places = read_json(index_path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise damaged(index_path, "it has no weight_map")
    if not all(isinstance(file, str) for file in places.values()):
        raise damaged(index_path, "its weight_map has file names that are not text")
    files: dict[str, SafetensorsFile] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise damaged(index_path, f"{file!r} points outside the directory")
        if not (directory / file).is_file():
            raise damaged(directory / file, f"the file is missing, but {INDEX_FILE} names it")
        files[file] = SafetensorsFile(directory / file)
    for name, file in places.items():
        if name not in files[file].entries:
            raise damaged(directory / file, f"{name} is not in it, but {INDEX_FILE} says it is")
    return {name: files[file] for name, file in places.items()}


def _missing(directory: Path, what: str) -> NemotronError:
    return NemotronError(
        "checkpoint_missing",
        f"{directory} {what}; wanted a Hugging Face checkpoint directory",
        where=str(directory),
        fix="pass a directory with config.json and safetensors weights",
        exit_code=ExitCode.DATA,
    )


def _pickled(directory: Path) -> NemotronError:
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2]); "
        "T.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    return pickled_weights(directory, f"{directory} has pickled weights (.bin or .pt)", script)


def _wrong_shape(
    path: Path, name: str, *, got: tuple[int, ...], wanted: tuple[int, ...]
) -> NemotronError:
    return NemotronError(
        "weights_shape",
        f"{name} has shape {list(got)}; config.json requires {list(wanted)}",
        where=str(path),
        why="the weights do not belong to the model that the config describes",
        fix="use a checkpoint whose config.json and weights belong together",
        exit_code=ExitCode.DATA,
    )
