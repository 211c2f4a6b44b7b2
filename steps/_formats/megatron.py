"""Finds, checks and reads Megatron checkpoints in the layout of Megatron-Bridge.

A checkpoint is a root directory with a tracker and one directory per iteration; the tensors are in
the iteration's DCP files under Megatron's names (``_models.layouts``). A checkpoint that we wrote
has an ``artifact.json``, and the source's config and tokenizer in ``hf/``; the config of one that
Megatron-Bridge wrote is in its ``run_config.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import local
from typing import Any

import torch
import yaml
from torch import Tensor

from nemotron.artifacts import MANIFEST, Artifact, read_artifact
from nemotron.errors import ExitCode, NemotronError
from nemotron.steps._formats.huggingface import read_decoder_config
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.weights import check_names, damaged, read_json, row_blocks
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.fields import naming
from nemotron.steps._models.layouts import (
    WeightRule,
    hf_tensors,
    part_rows,
    weight_rules,
)

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"
RUN_CONFIG = "run_config.yaml"
HF_DIR = "hf"
_ITERATION_MARKERS = (RUN_CONFIG, "train_state.pt", "metadata.json", ".metadata")
_LAYERS = "decoder.layers."
# Other names of the norms, from models without fused norms (mcore's local spec).
_ALIASES = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (
        "decoder.layers.input_layernorm.weight"
    ),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}
# Tensors with a row per token of the vocabulary, which Megatron pads to equal parts for all ranks.
_PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
# Prefixes of training state that is in the same files as the weights.
NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state_machine_state", "common_state")


class MegatronCheckpoint:
    """The weights of one iteration, under the names they have on disk; made by ``open_megatron``.

    Args:
        root: The checkpoint root, or the iteration directory where that stands alone.
        iteration_dir: Holds the DCP files.

    Attributes:
        config: Sizes of the model, from ``hf/config.json`` if there is one, since
            ``run_config.yaml`` cannot express every rope scaling.
        hf_dir: Directory with config, generation config, tokenizer and chat template of the source
            model; None if the checkpoint was not converted by us.
        artifact: The root's ``artifact.json``, or None.
    """

    def __init__(self, root: Path, iteration_dir: Path) -> None:
        self.root = root
        self.iteration_dir = iteration_dir
        has_hf = (root / HF_DIR / "config.json").is_file()
        self.hf_dir = root / HF_DIR if has_hf else None
        has_artifact = (root / MANIFEST).is_file()
        self.artifact: Artifact | None = (
            read_artifact(root, "checkpoint_megatron") if has_artifact else None
        )
        self.config = _read_decoder_config(self.hf_dir, iteration_dir)
        self._reader = TorchDistReader(iteration_dir)
        self._rules = {rule.megatron: rule for rule in weight_rules(self.config)}
        self._check_tensors()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all weights, without layer numbers, in the order of the model."""
        return tuple(self._rules)

    def dtype(self, name: str, *, layer: int | None = None) -> torch.dtype:
        """Return the type of a weight without reading it."""
        return self._reader.dtype(self._locate(self._rules[name], layer)[0])

    def read(
        self,
        name: str,
        *,
        layer: int | None = None,
        rows: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """Return one weight, or a slice of it, reading only the chunks that intersect it.

        Args:
            name: One of ``names``, such as ``decoder.layers.self_attention.linear_qkv.weight``.
            layer: Layer number in [0, num_layers); for names under ``decoder.layers.`` only.
            rows: Rows to read; all by default. Padding rows of the vocabulary are never returned.
            columns: Columns to read of a matrix; all by default.

        Returns:
            The weight without a layer dimension, contiguous.
        """
        rule = self._rules[name]
        on_disk, leading = self._locate(rule, layer)
        first, last, _ = (rows or slice(None)).indices(rule.shape[0])
        index = [*leading, slice(first, last)] + ([columns] if columns else [])
        tensor = self._reader.read(on_disk, index)
        return tensor[0] if leading else tensor

    def _locate(self, rule: WeightRule, layer: int | None) -> tuple[str, list[slice]]:
        """Return the name on disk and the index of the leading dimension, if it is stacked."""
        if rule.is_layered != (layer is not None):
            raise ValueError(f"{rule.megatron}: layer is {layer}")
        for name in (rule.megatron, _ALIASES.get(rule.megatron, rule.megatron)):
            if name in self._reader and layer is None:
                return name, []
            if name in self._reader and layer is not None:
                return name, [slice(layer, layer + 1)]
            single = name.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)
            if single in self._reader:
                return single, []
        raise KeyError(rule.megatron)

    def _check_tensors(self) -> None:
        wanted = set()
        for rule in self._rules.values():
            layers = range(self.config.num_layers) if rule.is_layered else (None,)
            for layer in layers:
                wanted.add(self._check_tensor(rule, layer))
        got = [name for name in self._reader.names if not name.startswith(NOT_WEIGHTS)]
        check_names(got, wanted, where=str(self.iteration_dir))

    def _check_tensor(self, rule: WeightRule, layer: int | None) -> str:
        """Return the name on disk of one weight whose shape is right."""
        try:
            name, leading = self._locate(rule, layer)
        except KeyError:
            return rule.megatron
        got = self._reader.shape(name)
        wanted = ((self.config.num_layers,) if leading else ()) + rule.shape
        is_padded = rule.megatron in _PADDED and got[:1] > wanted[:1] and got[1:] == wanted[1:]
        if got != wanted and not is_padded:
            raise NemotronError(
                "weights_shape",
                f"{name} has shape {list(got)}; the config requires {list(wanted)}",
                where=str(self.iteration_dir),
                why="the weights do not belong to the model that the config describes",
                fix="use a checkpoint whose config and weights belong together",
                exit_code=ExitCode.DATA,
            )
        return name


class MegatronWeights:
    """A Megatron checkpoint's weights under their Hugging Face names; see ``Weights``."""

    def __init__(self, checkpoint: MegatronCheckpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._tensors = hf_tensors(checkpoint.config)
        self._own = local()  # the last Megatron tensor, for each thread that reads

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        tensor = self._tensors[name]
        return self._checkpoint.dtype(tensor.rule.megatron, layer=tensor.layer)

    def read(self, name: str) -> Tensor:
        fused, runs = self._fused(name)
        parts = [fused[rows] for rows in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def blocks(self, name: str) -> Iterator[Tensor]:
        fused, runs = self._fused(name)
        for rows in runs:
            yield from row_blocks(fused[rows])

    def _fused(self, name: str) -> tuple[Tensor, list[slice]]:
        """Return the Megatron tensor that contains a tensor, and the tensor's rows in it.

        The last Megatron tensor is kept, because a thread asks for q, k and v one after another,
        which are parts of the same one, as gate and up are.
        """
        tensor = self._tensors[name]
        key = (tensor.rule.megatron, tensor.layer)
        last: tuple[Any, Tensor] | None = getattr(self._own, "last", None)
        if last is None or last[0] != key:
            self._own.last = None  # so that it is freed before the next one is read
            self._own.last = key, self._checkpoint.read(key[0], layer=tensor.layer)
        return self._own.last[1], part_rows(tensor, self.config)


def open_megatron(path: Path) -> MegatronCheckpoint:
    """Return the checkpoint at ``path``, a checkpoint root or an iteration directory.

    In a root the iteration is the one that the trackers name: ``latest_train_state.pt``, then
    ``latest_checkpointed_iteration.txt`` (a number or ``release``).

    Raises:
        NemotronError: ``checkpoint_missing``, ``checkpoint_format`` (fsdp_dtensor or another
            sharded backend), ``artifact_damaged``, ``unsafe_pickle``, ``model_unsupported``,
            ``weights_incomplete``, ``weights_unexpected`` or ``weights_shape``.
    """
    iteration_dir = find_iteration_dir(path)
    _check_format(iteration_dir)
    parent = iteration_dir.absolute().parent
    return MegatronCheckpoint(parent if _is_root(parent) else iteration_dir, iteration_dir)


def find_iteration_dir(path: Path) -> Path:
    """Return the iteration directory that ``path`` is, or that its trackers name.

    Raises:
        NemotronError: ``checkpoint_missing``: there is none.
    """
    if any((path / marker).is_file() for marker in _ITERATION_MARKERS):
        return path
    name = _tracked_iteration(path)
    if name is None:
        what = "has no tracker file" if path.is_dir() else "does not exist"
        if (path / "config.json").is_file():
            raise _missing(path, f"{path} is a Hugging Face checkpoint, not a Megatron checkpoint")
        raise _missing(path, f"{path} {what} and is not an iteration directory")
    if not (path / name).is_dir():
        raise _missing(path, f"the tracker in {path} names {name}, which does not exist")
    return path / name


def _tracked_iteration(root: Path) -> str | None:
    if (root / TRAIN_STATE).is_file():
        try:
            state = torch.load(root / TRAIN_STATE, map_location="cpu", weights_only=True)
            return f"iter_{int(state['step']):07d}"
        except Exception as error:  # a cut or changed file fails in any way it likes
            raise damaged(root / TRAIN_STATE, f"it does not load: {error!r}") from None
    if not (root / TRACKER).is_file():
        return None
    text = (root / TRACKER).read_text(encoding="utf-8").strip()
    if text == "release":
        return text
    if not text.isdecimal():
        raise damaged(root / TRACKER, f"it says {text!r}; wanted a number or release")
    return f"iter_{int(text):07d}"


def _is_root(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (MANIFEST, TRACKER, TRAIN_STATE))


def _check_format(iteration_dir: Path) -> None:
    """Refuse a checkpoint that only looks like one of format torch_dist."""
    marker = iteration_dir / "metadata.json"
    if not marker.is_file() and (iteration_dir / ".metadata").is_file():
        raise NemotronError(
            "checkpoint_format",
            f"{iteration_dir} has .metadata but no metadata.json; wanted ckpt_format torch_dist",
            where=str(iteration_dir),
            why="fsdp_dtensor checkpoints look like this, and so do unfinished torch_dist saves",
            fix="save or convert it with ckpt_format torch_dist, or take an earlier iteration",
            exit_code=ExitCode.DATA,
        )
    backend = read_json(marker).get("sharded_backend") if marker.is_file() else "torch_dist"
    if backend != "torch_dist":
        raise NemotronError(
            "checkpoint_format",
            f"{marker} says sharded_backend {backend!r}; wanted torch_dist",
            where=str(marker),
            fix="save or convert it with ckpt_format torch_dist",
            exit_code=ExitCode.DATA,
        )


def _read_decoder_config(hf_dir: Path | None, iteration_dir: Path) -> DecoderConfig:
    if hf_dir is not None:
        return read_decoder_config(hf_dir)
    with naming(iteration_dir / RUN_CONFIG):
        return DecoderConfig.from_run_config(read_run_config(iteration_dir))


def read_run_config(iteration_dir: Path) -> dict[str, Any]:
    """Return the ``run_config.yaml`` of an iteration.

    Raises:
        NemotronError: ``checkpoint_missing`` or ``artifact_damaged``.
    """
    path = iteration_dir / RUN_CONFIG
    if not path.is_file():
        raise _missing(
            iteration_dir, f"{iteration_dir} has neither hf/config.json nor {RUN_CONFIG}"
        )
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        raise damaged(path, "it is not a YAML mapping of plain values")
    return value


def _missing(path: Path, problem: str) -> NemotronError:
    return NemotronError(
        "checkpoint_missing",
        problem,
        where=str(path),
        fix="pass the directory of a Megatron checkpoint (convert/hf_to_megatron makes one)",
        exit_code=ExitCode.DATA,
    )
