"""Reads adapters of Megatron-Bridge: torch_dist checkpoints that have only ``.adapter.`` tensors.

``LoRA`` has one pair of factors per fused linear, ``CanonicalLoRA`` one per part. Layers are
stacked, or each has its own keys. Rank, alpha and targets are in ``run_config.yaml``; they are
checked against the tensors, since Megatron-Bridge silently accepts targets that match nothing.

Source: Megatron-Bridge 0.3 to 0.6 and of 2026-08, peft/{lora,canonical_lora,utils}.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron.steps._formats.lora import adapter_error
from nemotron.steps._formats.megatron import NOT_WEIGHTS, find_iteration_dir, read_run_config
from nemotron.steps._formats.torch_dist import TorchDistReader
from nemotron.steps._formats.weights import all_finite
from nemotron.steps._models.config import DecoderConfig
from nemotron.steps._models.layouts import (
    LORA_TARGETS,
    lora_hf_modules,
    lora_shapes,
    split_lora_rows,
)
from nemotron.steps._models.targets import LINEARS, linear_names, matches

_KEY = re.compile(
    r"decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<parent>self_attention|mlp)\.(?P<linear>linear_\w+)"
    r"\.adapter\.(?:adapter_(?P<part>\w+)\.)?linear_(?P<half>in|out)\.weight"
)
# CanonicalLoRA's names of the parts, and the names of the parts in its target_modules.
CANONICAL_PARTS = {
    "linear_qkv": ("q", "k", "v"),
    "linear_fc1": ("gate", "up"),
}
CANONICAL_TARGETS = {
    ("linear_qkv", "q"): "linear_q",
    ("linear_qkv", "k"): "linear_k",
    ("linear_qkv", "v"): "linear_v",
    ("linear_fc1", "gate"): "linear_fc1_gate",
    ("linear_fc1", "up"): "linear_fc1_up",
}


@dataclass(frozen=True)
class _Source:
    """The place of the factors of one Hugging Face module in the checkpoint."""

    linear: str
    part: int
    is_canonical: bool
    key: str
    layer: int | None


@dataclass(frozen=True)
class MegatronAdapter:
    """A checked adapter checkpoint of Megatron-Bridge; see ``LoraAdapter``."""

    directory: Path
    config: DecoderConfig
    dim: int
    alpha: float
    dropout: float
    base_model_name_or_path: str | None
    is_canonical: bool
    tp_size: int
    reader: TorchDistReader
    sources: Mapping[str, _Source]
    use_rslora: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Last parts of the adapted modules."""
        return tuple(sorted({module.rsplit(".", 1)[-1] for module in self.sources}))

    @property
    def rank_pattern(self) -> Mapping[str, int]:
        return {}

    @property
    def alpha_pattern(self) -> Mapping[str, float]:
        return {}

    def scale(self, module: str) -> float:
        return self.alpha / self.dim

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        source = self.sources[module]
        lora_a, lora_b = (self._read(source, half) for half in ("in", "out"))
        if not source.is_canonical:
            parts = split_lora_rows(source.linear, lora_b, config=self.config)
            return lora_a, parts[source.part].contiguous()
        if source.linear.endswith("linear_fc1"):
            lora_b = _unshuffle(lora_b, self.tp_size)
        return lora_a, lora_b

    def _read(self, source: _Source, half: str) -> Tensor:
        name = f"{source.key}.linear_{half}.weight"
        if source.layer is None:
            return self.reader.read(name)
        return self.reader.read(name, [slice(source.layer, source.layer + 1)])[0]


def is_megatron_adapter(path: Path) -> bool:
    """Return whether ``path`` looks like a checkpoint that Megatron-Bridge saved."""
    names = (".metadata", "latest_train_state.pt", "metadata.json")
    return any((path / name).is_file() for name in names)


def open_megatron_adapter(path: Path, *, config: DecoderConfig) -> MegatronAdapter:
    """Return the checked adapter at ``path``, a checkpoint root or an iteration directory.

    The checks cover the kind of adapter, the set of tensors against ``target_modules``, their
    shapes against rank and base, and that all values are finite.

    Raises:
        NemotronError: ``checkpoint_missing``, ``artifact_damaged``, ``unsafe_pickle``,
            ``adapter_config``, ``adapter_half_missing``, ``adapter_keys_missing``,
            ``adapter_keys_unexpected``, ``adapter_rank``, ``adapter_shape`` or
            ``adapter_not_finite``.
    """
    directory = find_iteration_dir(path)
    run_config = read_run_config(directory)
    peft = _check_peft(directory, run_config.get("peft"))
    reader = TorchDistReader(directory)
    is_canonical = str(peft["_target_"]).endswith(".CanonicalLoRA")
    sources = _find_sources(directory, reader, config)
    _check_targets(directory, sources, peft, config=config, is_canonical=is_canonical)
    checkpoint = run_config.get("checkpoint") or {}
    adapter = MegatronAdapter(
        directory=directory,
        config=config,
        dim=peft["dim"],
        alpha=float(peft["alpha"]),
        dropout=float(peft.get("dropout") or 0.0),
        base_model_name_or_path=checkpoint.get("pretrained_checkpoint"),
        is_canonical=is_canonical,
        tp_size=_tp_size(run_config),
        reader=reader,
        sources=sources,
    )
    _check_tensors(adapter)
    _check_split(adapter)
    return adapter


def _check_peft(directory: Path, peft: Any) -> dict[str, Any]:
    """Return the ``peft`` section of a plain LoRA."""
    where = directory / "run_config.yaml"
    kind = str(peft.get("_target_", "")).rsplit(".", 1)[-1] if isinstance(peft, dict) else None
    if kind not in ("LoRA", "CanonicalLoRA"):
        problem = f"peft is {kind or peft!r}; wanted LoRA or CanonicalLoRA"
        raise adapter_error("config", where, problem)
    for key in ("dim", "alpha"):
        value = peft.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise adapter_error("config", where, f"peft.{key} is {value!r}; wanted a number")
    return peft


def _find_sources(
    directory: Path, reader: TorchDistReader, config: DecoderConfig
) -> dict[str, _Source]:
    """Return the place of each module's factors, of which both halves must exist."""
    halves: dict[str, set[str]] = {}
    sources: dict[str, _Source] = {}
    for name in reader.names:
        if name.startswith(NOT_WEIGHTS):
            continue
        match = _KEY.fullmatch(name)
        if match is None or not _is_known(match):
            problem = f"{name} is not a tensor of an adapter on the decoder's linears"
            raise adapter_error("keys_unexpected", directory, problem)
        key = name.rsplit(".", 2)[0]
        halves.setdefault(key, set()).add(match["half"])
        sources |= _sources_of(key, match, config)
    for key, found in halves.items():
        if len(found) == 1:
            problem = f"{key} has only linear_{found.pop()}: one half of the pair is missing"
            raise adapter_error("half_missing", directory, problem)
    if not sources:
        raise adapter_error("keys_missing", directory, "it has no adapter tensors")
    order = {module: place for place, module in enumerate(lora_shapes(config))}
    return dict(sorted(sources.items(), key=lambda item: order.get(item[0], 0)))


def _is_known(match: re.Match[str]) -> bool:
    linear, part = match["linear"], match["part"]
    is_place = LINEARS.get(linear) == match["parent"]
    return is_place and (part is None or part in CANONICAL_PARTS.get(linear, ()))


def _sources_of(key: str, match: re.Match[str], config: DecoderConfig) -> dict[str, _Source]:
    is_stacked = match["layer"] is None
    layers = range(config.num_layers) if is_stacked else [int(match["layer"])]
    linear, part = match["linear"], match["part"]
    parts = range(len(LORA_TARGETS[linear]))
    if part is not None:
        parts = [CANONICAL_PARTS[linear].index(part)]
    sources = {}
    for layer in layers:
        name = f"decoder.layers.{layer}.{match['parent']}.{linear}"
        modules = lora_hf_modules(name)
        for each in parts:
            own_layer = layer if is_stacked else None
            sources[modules[each]] = _Source(name, each, part is not None, key, own_layer)
    return sources


def _check_targets(
    directory: Path,
    sources: Mapping[str, _Source],
    peft: Mapping[str, Any],
    *,
    config: DecoderConfig,
    is_canonical: bool,
) -> None:
    """Check that there are tensors for exactly the modules that ``target_modules`` names."""
    targets = [str(target) for target in peft.get("target_modules") or []]
    excluded = [str(target) for target in peft.get("exclude_modules") or []]
    wanted: set[str] = set()
    for name in linear_names(config.num_layers):
        linear = name.rsplit(".", 1)[-1]
        for index, module in enumerate(lora_hf_modules(name)):
            alias = name
            if is_canonical and linear in CANONICAL_PARTS:
                part = CANONICAL_PARTS[linear][index]
                alias = name.removesuffix(linear) + CANONICAL_TARGETS[linear, part]
            is_target = any(matches(target, alias) for target in targets)
            if is_target or (not targets and not any(matches(each, name) for each in excluded)):
                wanted.add(module)
    missing, unexpected = sorted(wanted - set(sources)), sorted(set(sources) - wanted)
    if missing:
        problem = f"adapted modules without tensors: {len(missing)}, first {missing[0]}"
        raise adapter_error("keys_missing", directory, problem)
    if unexpected:
        problem = f"{unexpected[0]} has tensors, but target_modules {targets} does not include it"
        raise adapter_error("keys_unexpected", directory, problem)


def _check_tensors(adapter: MegatronAdapter) -> None:
    shapes = lora_shapes(adapter.config)
    for module, source in adapter.sources.items():
        if module not in shapes:
            problem = f"{source.key} is beyond the base's {adapter.config.num_layers} layer(s)"
            raise adapter_error("shape", adapter.directory, problem)
        rows = shapes[module][0]
        if not source.is_canonical:
            rows = sum(shapes[each][0] for each in lora_hf_modules(source.linear))
        _check_shape(adapter, source, "in", (adapter.dim, shapes[module][1]))
        _check_shape(adapter, source, "out", (rows, adapter.dim))
    for source in {(each.key, each.layer): each for each in adapter.sources.values()}.values():
        for half in ("in", "out"):
            if not all_finite(adapter._read(source, half)):
                name = f"{source.key}.linear_{half}.weight"
                problem = f"{name} has values that are not finite"
                raise adapter_error("not_finite", adapter.directory, problem)


def _tp_size(run_config: Mapping[str, Any]) -> int:
    """Return the tensor-parallel size of a save; newer configs have it one level deeper."""
    section = run_config.get("model") or {}
    model = {**section, **(section.get("transformer") or {})}
    return int(model.get("tensor_model_parallel_size") or 1)


def _check_split(adapter: MegatronAdapter) -> None:
    """Check that factors whose row order depends on the tensor-parallel size were saved at it."""
    for source in adapter.sources.values():
        if not source.is_canonical or not source.linear.endswith("linear_fc1"):
            continue
        name = f"{source.key}.linear_out.weight"
        num_parts = len(adapter.reader.starts(name, 0 if source.layer is None else 1))
        # A single part has been written again as a whole, with its rows in the order of the save.
        if num_parts not in (1, 2 * adapter.tp_size):
            problem = (
                f"{name} was saved in {num_parts} parts, that is at tensor-parallel size "
                f"{num_parts // 2}, but run_config.yaml says {adapter.tp_size}, and the "
                "order of its rows depends on it"
            )
            raise adapter_error("config", adapter.directory, problem)


def _check_shape(
    adapter: MegatronAdapter, source: _Source, half: str, wanted: tuple[int, int]
) -> None:
    name = f"{source.key}.linear_{half}.weight"
    leading = () if source.layer is None else (adapter.config.num_layers,)
    got = adapter.reader.shape(name)
    if got == leading + wanted:
        return
    rank = -2 if half == "in" else -1
    other = -1 if half == "in" else -2
    is_matrix = len(got) == len(leading) + 2 and got[: len(leading)] == leading
    if is_matrix and got[other] == wanted[other]:
        problem = f"{name} has rank {got[rank]}; peft.dim is {adapter.dim}"
        raise adapter_error("rank", adapter.directory, problem)
    problem = f"{name} has shape {list(got)}; its rank and the base require {[*leading, *wanted]}"
    raise adapter_error("shape", adapter.directory, problem)


def _unshuffle(lora_b_FR: Tensor, tp_size: int) -> Tensor:
    """Return a CanonicalLoRA factor of linear_fc1 with its rows in the order of the module.

    Megatron-Bridge saves every factor of linear_fc1 as if each rank's shard had the halves
    [gate ; up], even those of adapter_gate and adapter_up, which have no such halves. So the file
    has the first halves of all ranks' shards, followed by their second halves.
    """
    halves = lora_b_FR.unflatten(0, (2, tp_size, -1))
    return halves.transpose(0, 1).reshape(lora_b_FR.shape)
