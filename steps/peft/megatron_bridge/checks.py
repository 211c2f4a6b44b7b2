"""Finds contradictions between config, data and base, before a process group exists.

Torch-free, because the launcher makes the same checks before it starts anything. The job makes them
again, on the files that it really sees.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from nemotron.artifacts import MANIFEST, Artifact, read_artifact, refuse_unlisted
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps._models.targets import first_match, linear_names, unmatched
from nemotron.steps._training.pipeline_schedule import split_layers
from nemotron.steps._training.resume import (
    NoSaveToLoadError,
    ResumeMismatchError,
    choose_start,
)
from nemotron.steps._training.run_directory import room_for
from nemotron.steps.peft.megatron_bridge.identity import run_identity
from nemotron.steps.peft.megatron_bridge.schema import Config

STEP = "peft/megatron_bridge"


def check(config: Config) -> list[NemotronError]:
    """Return every contradiction; inputs that do not exist yet are not checked."""
    errors = check_config(config)
    packs = _existing_packs(packed_root(config.packed_data), errors)
    base = _existing(base_root(config.checkpoint.pretrained_checkpoint), None, errors)
    if base is not None and base.type != "checkpoint_megatron":
        errors.append(_paths_mixed(config, f"is of type {base.type}"))
        base = None
    if packs is not None:
        errors += _check_packs(config, packs)
    if packs is not None and base is not None:
        errors += _check_tokenizer(config, packs, base)
    if base is not None:
        errors += _check_model(config, base_root(config.checkpoint.pretrained_checkpoint))
    if not errors and packs is not None and base is not None:
        errors += _check_resume(config)
    return errors


def check_config(config: Config) -> list[NemotronError]:
    """Return the contradictions of a config alone; no file is read."""
    absent = {
        "context_parallel_size": config.context_parallel_size,
        "expert_model_parallel_size": config.expert_model_parallel_size,
        "expert_tensor_parallel_size": config.model.expert_tensor_parallel_size or 1,
    }
    problems = [
        (name, f"{name} is {value}; only 1 is supported so far")
        for name, value in absent.items()
        if value != 1
    ]
    rows = config.train.micro_batch_size * config.recipe.data_parallel_size
    if config.train.global_batch_size % rows:
        problem = (
            f"global_batch_size {config.train.global_batch_size} is not a multiple of "
            f"micro_batch_size {config.train.micro_batch_size} x "
            f"data_parallel_size {config.recipe.data_parallel_size}"
        )
        problems.append(("train.global_batch_size", problem))
    problems += _check_chunks(config)
    return [
        step_error(STEP, "layout_unsupported", problem, where=where) for where, problem in problems
    ]


def existing_inputs(config: Config) -> tuple[Path, Path]:
    """Return the root of the packed data and the path of the base, which exist and match.

    Raises:
        NemotronError: The first contradiction, or an input is missing.
    """
    errors = check(config)
    if errors:
        raise errors[0]
    packs, base = packed_root(config.packed_data), config.checkpoint.pretrained_checkpoint
    if packs is None:
        problem = f"no packed data in {config.packed_data}"
        raise step_error(STEP, "missing_packed_data", problem)
    if base is None or not Path(base).exists():
        raise step_error(STEP, "missing_base_checkpoint", f"no checkpoint in {base}")
    return packs, Path(base)


def packed_root(path: str | None) -> Path | None:
    """Return the packing's output directory, given itself, its splits/train or a glob of shards."""
    if path is None:
        return None
    start = Path(path)
    return next((p for p in (start, *start.parents[:4]) if (p / MANIFEST).is_file()), None)


def base_root(path: str | None) -> Path | None:
    """Return the root of a Megatron checkpoint, given itself or its iteration directory."""
    if path is None:
        return None
    start = Path(path)
    return next((p for p in (start, start.parent) if (p / MANIFEST).is_file()), None)


def _existing(
    root: Path | None, wanted: str | None, errors: list[NemotronError]
) -> Artifact | None:
    if root is None:
        return None
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        return read_artifact(root, wanted or str(manifest["type"]))
    except NemotronError as error:
        errors.append(error)
    return None


def _existing_packs(root: Path | None, errors: list[NemotronError]) -> Artifact | None:
    packs = _existing(root, "packed_parquet", errors)
    if root is None or packs is None:
        return None
    try:
        refuse_unlisted(root, packs, "splits/*/*.parquet")  # training reads all that are there
    except NemotronError as error:
        errors.append(error)
    return packs


def _check_chunks(config: Config) -> list[tuple[str, str]]:
    model = config.model
    if (model.virtual_pipeline_model_parallel_size or 1) == 1:
        return []
    where = "model.virtual_pipeline_model_parallel_size"
    if config.pipeline_model_parallel_size == 1:
        return [(where, "interleaving parts needs more than one pipeline stage")]
    if model.num_layers_in_first_pipeline_stage or model.num_layers_in_last_pipeline_stage:
        return [
            (where, "parts must be of equal size: num_layers_in_first/last cannot be set as well")
        ]
    return []


def _check_packs(config: Config, packs: Artifact) -> list[NemotronError]:
    errors = []
    valid = config.dataset.packed_sequence_specs.packed_val_data_path
    if valid is not None and packed_root(valid) != packed_root(config.packed_data):
        problem = f"packed_val_data_path={valid} is not part of {config.packed_data}"
        errors.append(step_error(STEP, "missing_packed_data", problem))
    pack_size = packs.properties["pack_size"]
    if pack_size != config.seq_length:
        problem = f"recipe.seq_length is {config.seq_length}; the rows were packed for {pack_size}"
        errors.append(
            step_error(STEP, "seq_length_mismatch", problem, where=str(config.packed_data))
        )
    rows, batch = packs.properties["splits"]["train"]["rows"], config.train.global_batch_size
    if rows < batch:
        problem = f"the train split has fewer rows ({rows}) than train.global_batch_size ({batch})"
        errors.append(step_error(STEP, "too_few_rows", problem, where=str(config.packed_data)))
    return errors


def _check_tokenizer(config: Config, packs: Artifact, base: Artifact) -> list[NemotronError]:
    of_packs, of_base = (each.properties["tokenizer_blake3"] for each in (packs, base))
    if of_packs == of_base:
        return []
    made_with, has = (
        f"tokenizer {each[:12]}" if each else "no tokenizer.json" for each in (of_packs, of_base)
    )
    problem = (
        f"{config.packed_data} was made with {made_with}, "
        f"{config.checkpoint.pretrained_checkpoint} has {has}"
    )
    return [step_error(STEP, "tokenizer_mismatch", problem, where=str(config.packed_data))]


def target_errors(
    patterns: Mapping[str, Collection[str]], *, num_layers: int
) -> list[NemotronError]:
    """Return an error for every pattern that matches none of the linears that it could match.

    Args:
        patterns: Patterns by config key. ``peft.target_modules`` are matched against all linears,
            those of other keys against the linears that ``peft.target_modules`` name.
        num_layers: Layers of the base.
    """
    names = linear_names(num_layers)
    adapted = [name for name in names if first_match(patterns["peft.target_modules"], name)]
    errors = []
    for key, own in patterns.items():
        is_target = key == "peft.target_modules"
        candidates, kind = (names, "linears") if is_target else (adapted, "adapted linears")
        for pattern, closest in unmatched(own, candidates).items():
            problem = (
                f"{key} has {pattern!r}, which matches none of the {len(candidates)} {kind} of "
                f"{num_layers} layers (closest: {', '.join(closest)})"
            )
            errors.append(step_error(STEP, "no_such_module", problem, where=key))
    return errors


def _check_model(config: Config, base: Path | None) -> list[NemotronError]:
    hf_config = base / "hf" / "config.json" if base else None
    if hf_config is None or not hf_config.is_file():
        return []
    model = json.loads(hf_config.read_text(encoding="utf-8"))
    patterns: dict[str, Collection[str]] = {
        "peft.target_modules": config.peft.target_modules,
        "peft.rank_pattern": config.peft.rank_pattern,
        "peft.alpha_pattern": config.peft.alpha_pattern,
    }
    num_chunks = config.model.virtual_pipeline_model_parallel_size or 1
    return target_errors(patterns, num_layers=model["num_hidden_layers"]) + layout_errors(
        num_layers=model["num_hidden_layers"],
        num_query_groups=model.get("num_key_value_heads") or model["num_attention_heads"],
        ffn_hidden_size=model["intermediate_size"],
        tensor_parallel_size=config.tensor_model_parallel_size,
        num_stages=config.pipeline_model_parallel_size * num_chunks,
        num_layers_in_first_stage=config.model.num_layers_in_first_pipeline_stage,
        num_layers_in_last_stage=config.model.num_layers_in_last_pipeline_stage,
        where=str(hf_config),
    )


def layout_errors(
    *,
    num_layers: int,
    num_query_groups: int,
    ffn_hidden_size: int,
    tensor_parallel_size: int,
    num_stages: int,
    num_layers_in_first_stage: int | None,
    num_layers_in_last_stage: int | None,
    where: str,
) -> list[NemotronError]:
    """Return an error for every size of a base that cannot be split over the ranks.

    Args:
        num_layers: Layers of the base.
        num_query_groups: Its heads of keys and values.
        ffn_hidden_size: Its features between the linears of the MLP.
        tensor_parallel_size: Ranks that share every linear.
        num_stages: Pipeline stages times the parts of each.
        num_layers_in_first_stage: Layers of the first stage; None for an equal share.
        num_layers_in_last_stage: Layers of the last stage, likewise.
        where: File or directory that states the sizes.
    """
    sizes = {"num_query_groups": num_query_groups, "ffn_hidden_size": ffn_hidden_size}
    problems = [
        f"{name} {size} is not divisible by tensor_model_parallel_size {tensor_parallel_size}"
        for name, size in sizes.items()
        if size % tensor_parallel_size
    ]
    first, last = num_layers_in_first_stage, num_layers_in_last_stage
    try:
        split_layers(num_layers, num_stages, first=first, last=last)
    except ValueError as error:
        problems.append(str(error))
    return [step_error(STEP, "layout_unsupported", each, where=where) for each in problems]


def _check_resume(config: Config) -> list[NemotronError]:
    """Refuse to resume from another run's save, or to start where something else is.

    The job verifies the digests of the save's files; this check does not.
    """
    packs, base = packed_root(config.packed_data), config.checkpoint.pretrained_checkpoint
    if packs is None or base is None:
        return []
    output, load = config.checkpoint.save, config.checkpoint.other_run
    try:
        start = choose_start(
            output,
            load=load,
            ckpt_step=config.checkpoint.ckpt_step,
            train_iters=config.train.train_iters,
            identity=run_identity(config, packs, Path(base)),
            digests=False,
        )
        if not start.is_in_place:
            room_for(output, load=load)
    except (ResumeMismatchError, NoSaveToLoadError) as error:
        return [start_refused(error)]
    except NemotronError as error:
        return [error]
    return []


def start_refused(error: ResumeMismatchError | NoSaveToLoadError) -> NemotronError:
    """Return the manifest's error for a save that a run cannot resume from."""
    is_mismatch = isinstance(error, ResumeMismatchError)
    name = "resume_mismatch" if is_mismatch else "no_save_to_load"
    return step_error(STEP, name, str(error), where="checkpoint")


def _paths_mixed(config: Config, what: str) -> NemotronError:
    problem = f"checkpoint.pretrained_checkpoint={config.checkpoint.pretrained_checkpoint} {what}"
    return step_error(STEP, "base_and_adapter_paths_mixed", problem, where="checkpoint")
