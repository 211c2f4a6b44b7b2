"""Checks that need neither torch nor pyarrow nor a tokenizer, made before the job starts."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path

from nemotron.artifacts import refuse_overlap
from nemotron.errors import NemotronError
from nemotron.steps._entry import step_error
from nemotron.steps.data_prep.sft_packing.blend import HUB, STEP, Sources, read_blend
from nemotron.steps.data_prep.sft_packing.schema import Config
from nemotron.steps.data_prep.sft_packing.templates import (
    bundled_names,
    is_inline,
    read_template,
    unknown_template,
)


def check(config: Config) -> list[NemotronError]:
    """Return every problem of a config and of the inputs that exist."""
    return _problems(config, _check_inputs, _check_template, _check_context_length)


def check_config(config: Config) -> list[NemotronError]:
    """Return the problems of a config alone; no input is read."""
    return _problems(config, _check_paths, _check_template_name)


def datasets_of(config: Config) -> Sources:
    """Return the data sets that a config asks for.

    Raises:
        NemotronError: ``bad_blend``.
    """
    return read_blend(
        config.blend_path,
        messages_field=config.messages_field,
        tools_field=config.tools_field,
        max_rows=config.max_rows,
    )


def _problems(config: Config, *checks: Callable[[Config], None]) -> list[NemotronError]:
    errors: list[NemotronError] = []
    for run in checks:
        try:
            run(config)
        except NemotronError as error:
            errors.append(error)
    return errors


def _check_inputs(config: Config) -> None:
    for item in datasets_of(config).datasets:
        if item.path.startswith(HUB):
            continue
        for name in glob.glob(item.path, recursive=True):  # noqa: PTH207
            key = "blend_path" if item.path == str(config.blend_path) else item.name
            refuse_overlap(config.output_dir, {key: Path(name)})
    _check_paths(config)


def _check_paths(config: Config) -> None:
    tokenizer = Path(config.tokenizer_options.model)
    blend = Path(config.blend_path)
    refuse_overlap(config.output_dir, {"blend_path": blend, "tokenizer": tokenizer})


def _check_template(config: Config) -> None:
    name = config.chat_template
    if name is not None and not is_inline(name) and Path(name).is_file():
        read_template(name)
    else:
        _check_template_name(config)


def _check_template_name(config: Config) -> None:
    name = config.chat_template
    if name is None or is_inline(name) or name in bundled_names():
        return
    # A path that is not here may be on the machine where the job runs.
    if Path(name).suffix == "" and Path(name).name == name:
        raise unknown_template(name)


def _check_context_length(config: Config) -> None:
    path = Path(config.tokenizer_options.model) / "config.json"
    if not path.is_file():
        return
    try:
        model = json.loads(path.read_bytes())
    except ValueError:
        return  # the job says so when it loads the tokenizer
    context = model.get("text_config", model).get("max_position_embeddings")
    longest = config.max_stored_tokens - 1
    if isinstance(context, int) and longest > context:
        problem = f"documents may have up to {longest} tokens; the model's context is {context}"
        raise step_error(STEP, "seq_length_mismatch", problem, where=str(path))
