"""Composes a config, a profile and ``key=value`` arguments into the values of one job.

From the lowest layer to the highest: the ``defaults:`` chain, the YAML, the profile (in
``run.env``, except for keys of ``YAML_KEEPS`` that the YAML sets), the arguments. The result exists
twice: as this machine checks it, and as the job reads it. The two differ in the paths of files that
ship with the steps, which a remote job resolves for itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from nemotron.catalog import DEFAULT_CONFIG, Step
from nemotron.config import Schema, override, read_config
from nemotron.errors import NemotronError, raise_all
from nemotron.executors import EXECUTORS, WITHOUT_EFFECT, Execution, LeptonExecution
from nemotron.interpolation import escape, resolve
from nemotron.profile import Profile
from nemotron.tree import Node, child_at, display, merge, plain
from nemotron.validation import refuse_home, refuse_secrets, validate

YAML_KEEPS = (
    "container_image",
    "nodes",
    "gpus_per_node",
    "ntasks_per_node",
    "nproc_per_node",
)
NOT_LOCAL = ("container_image", "gpus_per_node", "ntasks_per_node", "extra", "run_command")

M = TypeVar("M", bound=BaseModel)


class InputMaker(Schema):
    """The producer of an input that is missing: a step and the config that it runs with."""

    step: str
    config: str = DEFAULT_CONFIG


class RunSection(Schema):
    """The section ``run`` of a config; ``env`` has a schema of its own for each executor."""

    env: dict[str, Any] = Field(default={})
    producers: dict[str, InputMaker] = Field(default={})


@dataclass(frozen=True)
class Composed:
    """The result of composing a config, a profile and arguments.

    Attributes:
        tree: Every value with its place, references resolved for this machine.
        execution: ``run.env``.
        producers: Producers of inputs that are missing, by type of artifact.
        config: The step's own part, as this machine checks it.
        values: The same as the job reads it; for a remote job, text that is yet to be resolved.
        notes: A line for everything that was asked for and has no effect.
    """

    tree: Node
    execution: Execution
    producers: dict[str, InputMaker]
    config: BaseModel
    values: dict[str, Any]
    notes: tuple[str, ...]


def compose(step: Step, path: Path, overrides: Sequence[str], profile: Profile | None) -> Composed:
    """Return the values of one run of a step with the config at ``path``.

    Raises:
        NemotronError: Whatever is wrong in the config, the profile or the arguments, all at once.
    """
    executor = profile.executor if profile else "local"
    written = override(_lay_profile(read_config(path), profile), overrides)
    tree = resolve(written)
    refuse_secrets(tree, references="secret_vars")
    refuse_home(tree, leave_out=("run",))
    execution, run, config = _validate(tree, step, executor, display(path))
    read_by_job = config
    if executor != "local":
        kept = _own_part(resolve(written, keep_steps=True))
        read_by_job = validate(kept, step.load_schema().Config, source=display(path))
    return Composed(
        tree=tree,
        execution=execution,
        producers=run.producers,
        config=config,
        values=read_by_job.model_dump(mode="json", by_alias=True),
        notes=tuple(_without_effect(tree, execution, profile)),
    )


def _lay_profile(tree: Node, profile: Profile | None) -> Node:
    """Return the config with the profile in ``run.env``."""
    env = child_at(tree, ("run", "env")) or Node({})
    written = env.value if isinstance(env.value, dict) else {}
    for key, node in written.items():
        if key not in (*YAML_KEEPS, "env_vars"):
            raise NemotronError(
                "unknown_key",
                f"a config cannot set run.env.{key}",
                where=node.place,
                fix=f"set {key} in a profile, or pass run.env.{key}=...",
            )
    if profile is None:
        return tree
    kept = {
        key: node for key, node in written.items() if key in YAML_KEEPS and node.value is not None
    }
    # The profile's own references are resolved; a ${ that is left in it is text.
    composed = merge(merge(env, escape(profile.values)), Node(kept))
    # On a tree without run.env: merged with its own parts, each value would seem to be overridden.
    bare = merge(tree, Node({"run": Node({"env": Node(None)})}))
    return merge(bare, Node({"run": Node({"env": composed})}))


def _without_effect(tree: Node, execution: Execution, profile: Profile | None) -> Iterator[str]:
    """Yield a line per key that changes nothing."""
    for key, reason in WITHOUT_EFFECT.items():
        if key in execution.model_fields_set:
            yield f"the profile's {key} has no effect: {reason}"
    if isinstance(execution, LeptonExecution):
        has_queue = execution.can_be_preempted or execution.can_preempt  # as nemo-run has it
        if execution.queue_priority is not None and not has_queue:
            yield "queue_priority has no effect without can_be_preempted or can_preempt"
    is_local = profile is None or profile.executor == "local"
    for key in NOT_LOCAL if is_local else ():
        used = child_at(tree, ("run", "env", key))
        if used is not None and used.place.startswith("argument"):
            yield f"run.env.{key} has no effect on a local run"
        elif profile and child_at(profile.values, (key,)):
            yield f"the profile's {key} has no effect on a local run"
    if profile is not None:
        yield from profile.notes
        yield from _kept_over(profile, tree)


def _kept_over(profile: Profile, tree: Node) -> Iterator[str]:
    """Yield a line per key of a profile for which the YAML keeps another value."""
    for key in YAML_KEEPS:
        asked, used = child_at(profile.values, (key,)), child_at(tree, ("run", "env", key))
        if asked is None or used is None or used.value == asked.value:
            continue
        is_unused = profile.executor == "local" and key in NOT_LOCAL
        if not used.place.startswith("argument") and not is_unused:
            given, kept = (json.dumps(plain(node)) for node in (asked, used))
            yield (
                f"the profile's {key} = {given} has no effect: {used.place} sets {kept}; "
                f"pass run.env.{key}={given}"
            )


def _validate(
    tree: Node, step: Step, executor: str, source: str
) -> tuple[Execution, RunSection, BaseModel]:
    """Return ``run.env``, the rest of ``run`` and the step's own config, each as its schema."""
    run = child_at(tree, ("run",)) or Node({})
    env = child_at(run, ("env",)) or Node({})
    failures: list[NemotronError] = []

    def checked(part: Node, model: type[M], prefix: tuple[str, ...] = ()) -> M | None:
        try:
            return validate(part, model, prefix=prefix, source=source)
        except NemotronError as error:
            failures.extend(getattr(error, "errors", (error,)))
            return None

    schema: type[BaseModel] = step.load_schema().Config
    execution = checked(env, EXECUTORS[executor], ("run", "env"))
    section = checked(run, RunSection, ("run",))
    config = checked(_own_part(tree), schema)
    if execution is None or section is None or config is None:
        raise_all(failures)
        raise AssertionError("a failed validation without errors")
    return execution, section, config


def _own_part(tree: Node) -> Node:
    """Return what the step's own schema describes: everything except ``run``."""
    assert isinstance(tree.value, dict)  # noqa: S101 - a config is a mapping
    return Node({key: node for key, node in tree.value.items() if key != "run"}, tree.place)
