"""The catalogue of steps: finds them, resolves what a user typed, says which produces what."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nemotron
from nemotron.artifacts import is_a, load_types
from nemotron.errors import NemotronError
from nemotron.manifest import FILE_NAME, Manifest, read_manifest
from nemotron.tree import display
from nemotron.validation import closest, did_you_mean

DEFAULT_CONFIG = "default"


@dataclass(frozen=True)
class Step:
    """A step: its directory and what its ``step.toml`` says."""

    directory: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """``category/name``, such as ``peft/megatron_bridge``."""
        return self.manifest.step.id

    @property
    def module(self) -> str:
        """The package of the step, such as ``nemotron.steps.peft.megatron_bridge``."""
        return "nemotron.steps." + self.id.replace("/", ".")

    def load_schema(self) -> ModuleType:
        """Return the module with the step's ``Config``; it imports no torch."""
        return importlib.import_module(f"{self.module}.schema")

    def load_checks(self) -> ModuleType | None:
        """Return the module with the step's ``check``, if it has one.

        If ``check`` reads files, the module also has a ``check_config`` with those of the checks
        that read none: a remote job has other files than this machine.
        """
        if importlib.util.find_spec(f"{self.module}.checks") is None:
            return None
        return importlib.import_module(f"{self.module}.checks")


def steps_root() -> Path:
    """Return the directory of the packaged steps.

    Raises:
        NemotronError: ``steps_missing``: a clone in which ``src/nemotron/steps`` is no link.
    """
    root = Path(nemotron.__file__).parent / "steps"
    if not root.is_dir():
        raise NemotronError(
            "steps_missing",
            f"{root} is not a directory; no step can be found",
            why="this clone was made without symbolic links",
            fix="git config core.symlinks true && git checkout -- src/nemotron/steps",
        )
    return root


def find_steps(root: Path | None = None) -> list[Step]:
    """Return every step below ``root`` (default: the packaged ones), sorted by id.

    Raises:
        NemotronError: A manifest is invalid, or its id is not its directory (``step_misplaced``).
    """
    root = steps_root() if root is None else root
    steps = []
    for path in sorted(root.rglob(FILE_NAME)):
        relative = path.parent.relative_to(root)
        if any(part.startswith(("_", ".")) for part in relative.parts):
            continue
        step = Step(path.parent, read_manifest(path))
        if step.id != relative.as_posix():
            raise NemotronError(
                "step_misplaced",
                f"{display(path)} says id {step.id!r}; its directory is {relative.as_posix()!r}",
                where=f"{display(path)}: step.id",
                fix=f'set id = "{relative.as_posix()}", or move the directory',
            )
        steps.append(step)
    return steps


def find_step(name: str, root: Path | None = None) -> Step:
    """Return the step with the id ``name``, or the only one whose id ends in ``/name``.

    Raises:
        NemotronError: ``step_unknown`` (with the closest ids) or ``step_ambiguous``.
    """
    steps = {step.id: step for step in find_steps(root)}
    if name in steps:
        return steps[name]
    matches = [step_id for step_id in steps if step_id.endswith(f"/{name}")]
    if len(matches) == 1:
        return steps[matches[0]]
    if matches:
        raise NemotronError(
            "step_ambiguous",
            f"{name!r} is the name of several steps",
            fix=f"give the whole id: {' or '.join(matches)}",
        )
    tails = {step_id.rpartition("/")[2]: step_id for step_id in steps}
    near = closest(name, steps) or [tails[tail] for tail in closest(name, tails)]
    fix = f"did you mean {' or '.join(near)}?" if near else f"choose from: {', '.join(steps)}"
    raise NemotronError("step_unknown", f"no step {name!r}", fix=fix)


def select(
    steps: list[Step],
    *,
    category: str | None = None,
    consumes: str | None = None,
    produces: str | None = None,
    tag: str | None = None,
) -> list[Step]:
    """Return the steps that fit every filter given.

    Args:
        steps: What to choose from.
        category: The step's category.
        consumes: An artifact type that the step accepts: one that it declares, or a special case.
        produces: An artifact type that the step makes, or a general case of one.
        tag: One of its tags.

    Raises:
        NemotronError: ``filter_unknown``: no such category, artifact type or tag exists.
    """
    types = load_types()
    _refuse_unknown("category", category, {step.manifest.step.category for step in steps})
    _refuse_unknown("artifact type", consumes, types)
    _refuse_unknown("artifact type", produces, types)
    _refuse_unknown("tag", tag, {name for step in steps for name in step.manifest.step.tags})
    return [
        step
        for step in steps
        if category in (None, step.manifest.step.category)
        and (tag is None or tag in step.manifest.step.tags)
        and (consumes is None or any(is_a(consumes, c.type) for c in step.manifest.consumes))
        and (produces is None or any(is_a(p.type, produces) for p in step.manifest.produces))
    ]


def producers_of(artifact_type: str, steps: list[Step]) -> list[str]:
    """Return the ids of the steps that produce an artifact of this type."""
    return [
        step.id
        for step in steps
        if any(is_a(produced.type, artifact_type) for produced in step.manifest.produces)
    ]


def config_names(step: Step) -> list[str]:
    """Return the names that ``-c`` takes for a step, ``default`` first."""
    names = sorted(path.stem for path in (step.directory / "config").glob("*.y*ml"))
    return sorted(names, key=lambda name: name != DEFAULT_CONFIG)


def find_config(step: Step, name: str) -> Path:
    """Return the file that ``-c name`` stands for: a config of the step, or a path.

    Raises:
        NemotronError: ``config_unknown``, ``config_missing``, ``config_ambiguous``.
    """
    here = Path(name)
    if "/" in name or here.is_absolute():
        if here.is_file():
            return here
        fix = f"check the path, or use a config of the step: {', '.join(config_names(step))}"
        raise NemotronError("config_missing", f"no file {name}", where=f"-c {name}", fix=fix)
    directory = step.directory / "config"
    candidates = [directory / f"{name}{suffix}" for suffix in ("", ".yaml", ".yml")]
    packaged = next((path for path in candidates if path.is_file()), None)
    is_local = here.suffix in (".yaml", ".yml") and here.is_file()
    if packaged and is_local:
        raise NemotronError(
            "config_ambiguous",
            f"{name} is a config of {step.id} and also a file here",
            where=f"-c {name}",
            fix=f"pass -c {here.stem} for the step's config, or -c ./{name} for the file",
        )
    if packaged or is_local:
        return packaged or here
    names = config_names(step)
    fix = did_you_mean(here.stem, names, "pass one of these names, or a path with a slash")
    problem = f"{step.id} has no config {name!r} (it has: {', '.join(names)})"
    raise NemotronError("config_unknown", problem, where=f"-c {name}", fix=fix)


def _refuse_unknown(what: str, name: str | None, known: Iterable[str]) -> None:
    if name is None or name in known:
        return
    fix = did_you_mean(name, known, f"choose from: {', '.join(sorted(known))}")
    raise NemotronError("filter_unknown", f"no {what} {name!r}", fix=fix)
