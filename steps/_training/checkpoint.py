"""Saves: each is an ``iter_NNNNNNN`` directory with an adapter that PEFT loads as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron.artifacts import Input, Producer, hold, publish, write_artifact, write_text
from nemotron.errors import NemotronError
from nemotron.steps._formats.adapter import write_adapter
from nemotron.steps._formats.huggingface import CHAT_TEMPLATE, TOKENIZER_FILES, copy_files
from nemotron.steps._training.distributed import Layout
from nemotron.steps._training.pipeline import PipelineStage
from nemotron.steps._training.resume import save_name
from nemotron.steps._training.run_directory import TRACKER
from nemotron.steps._training.trainer_state import gather_whole, write_trainer_state


class SaveFailedError(OSError):
    """A save could not be written, such as on a full disk; the earlier ones are untouched."""


@contextlib.contextmanager
def hold_output(layout: Layout, directory: Path) -> Iterator[None]:
    """Keep other runs from continuing in this run's directory while this one is alive.

    Raises:
        NemotronError: ``output_locked``, on the first rank.
    """
    with contextlib.ExitStack() as stack:
        if layout.is_first:
            directory.absolute().parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(directory.absolute()))
        yield


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from: what each of its saves says, and the files that go with it.

    Attributes:
        base_model_name_or_path: The base that the adapter's config names.
        tokenizer_dir: Directory of the base's tokenizer, or None.
        packed_root: Packed data, whose chat template is saved with the adapter.
        produced_by: Producer of the artifact.
        inputs: Inputs of the artifact.
        properties: Properties of the artifact that are the same at every save.
    """

    base_model_name_or_path: str
    tokenizer_dir: Path | None
    packed_root: Path
    produced_by: Producer
    inputs: Sequence[Input]
    properties: Mapping[str, Any]


def save_adapter(
    directory: Path,
    model: PipelineStage,
    *,
    layout: Layout,
    iteration: int,
    origin: Origin,
    losses: Mapping[str, Any],
    moments: Mapping[str, Tensor],
    run_state: Mapping[str, Any],
) -> Path:
    """Write the adapter of an iteration; a collective of all ranks, of which the first one writes.

    The base's tokenizer and the packs' chat template are saved with the adapter, because one that
    is served with another template answers other questions than it was trained on. ``losses`` are
    further properties of the artifact. ``moments`` and ``run_state`` are what a run resumes from;
    if there are no moments, neither is written.

    Returns:
        The ``iter_NNNNNNN`` directory, complete once the first rank has returned.
    """
    target = directory / save_name(iteration)
    own = (each for linear in model.adapted_linears() for each in linear.lora_parameters())
    whole = gather_whole(model, {each.name: each.parameter.detach() for each in own}, layout)
    if layout.is_first:
        with publish(target, step=origin.produced_by.step) as partial:
            _write_factors(partial, model, whole, origin.base_model_name_or_path)
            if origin.tokenizer_dir is not None:
                copy_files(origin.tokenizer_dir, partial, TOKENIZER_FILES)
            copy_files(origin.packed_root, partial, [CHAT_TEMPLATE])
            if moments:
                write_trainer_state(partial, moments, run_state)
            write_artifact(
                partial,
                artifact_type="checkpoint_lora",
                produced_by=origin.produced_by,
                inputs=origin.inputs,
                properties={**origin.properties, **losses, "iteration": iteration},
            )
        write_text(directory / TRACKER, f"{iteration}\n")
    return target


def _write_factors(
    directory: Path, model: PipelineStage, whole: Mapping[str, Tensor], base: str
) -> None:
    """Write the factors of all linears, whole and by name, in PEFT's layout."""
    lora = model.lora
    assert lora is not None  # a model without an adapter is not trained
    linears = [name.removesuffix(".lora_a") for name in whole if name.endswith(".lora_a")]
    write_adapter(
        directory,
        {name: (whole[f"{name}.lora_a"], whole[f"{name}.lora_b"]) for name in linears},
        config=model.config,
        dim=lora.spec.dim,
        alpha=lora.spec.alpha,
        dropout=lora.spec.dropout,
        use_rslora=lora.spec.use_rslora,
        alphas={name: own.alpha for name in linears if (own := lora.of(name))},
        base_model_name_or_path=base,
    )


def fail_together(layout: Layout, save: Callable[[], Path]) -> Path:
    """Call ``save`` and return its result once all ranks have saved; all fail if one does.

    Raises:
        SaveFailedError: A rank could not write; raised on every rank.
    """
    problem, target = "", Path()
    try:
        target = save()
    except (OSError, NemotronError) as error:  # a full disk, or a directory that is not ours
        problem = error.problem if isinstance(error, NemotronError) else str(error)
    if layout.any_rank(bool(problem)):
        raise SaveFailedError(problem or "another rank could not write")
    return target
