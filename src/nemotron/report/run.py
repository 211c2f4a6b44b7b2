"""Reads a training run from ``metrics.jsonl`` and from the records of the jobs that wrote it.

A run may have been stopped and resumed several times, each time by another job. A killed job could
not write its end into ``metrics.jsonl``; that is in the job's record.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from nemotron import catalog, jobs
from nemotron.errors import ExitCode, NemotronError
from nemotron.jobs import JobRecord
from nemotron.redaction import redact_data

METRICS_FILE = "metrics.jsonl"
Points = list[tuple[int, float]]
_LARGEST = 1e300  # values beyond it cannot be placed on an axis
_LAST_TIME = 250_000_000_000  # in the year 9892


@dataclass(frozen=True)
class TimelineEntry:
    """Something that happened to a run: Unix time, steps taken by then (if known), what it was."""

    time: float
    iteration: int | None
    text: str


@dataclass(frozen=True)
class TrainingRun:
    """One run.

    Attributes:
        name: Id of the job that was asked for, or name of the directory.
        directory: Directory of ``metrics.jsonl``.
        status: Status of the last job; None if there is no record of one.
        config: The last job's config by dotted key, secrets hidden.
        steps: The finite values recorded for each optimizer step, by iteration.
        validations: Iterations with their loss on the valid split.
        saves: Iterations that were saved, with the directory.
        timeline: Starts, ends and failures, in order of time.
    """

    name: str
    directory: Path
    status: str | None
    config: dict[str, Any]
    steps: dict[int, dict[str, float]]
    validations: Points
    saves: list[tuple[int, str]]
    timeline: list[TimelineEntry]

    def series(self, field: str) -> Points:
        """Return iteration and value for every step that recorded this value."""
        return [
            (iteration, float(step[field]))
            for iteration, step in self.steps.items()
            if field in step
        ]

    @property
    def best(self) -> tuple[int, float] | None:
        """Iteration and loss of the best evaluation."""
        return min(self.validations, key=lambda point: point[1], default=None)


def read_run(target: str, root: Path | None = None) -> TrainingRun:
    """Return the run of a job, given by its id or a part of it, or of a directory.

    Args:
        target: Job, or the directory that holds ``metrics.jsonl``.
        root: Directory of the job records.

    Raises:
        NemotronError: ``job_unknown``, ``job_ambiguous``, or ``no_metrics``: there is nothing to
            report on.
    """
    if (Path(target) / METRICS_FILE).is_file():
        return _read(Path(target).resolve().name, Path(target).resolve(), root)
    if Path(target).is_dir():
        raise _no_metrics(f"{target} contains no {METRICS_FILE}")
    record = jobs.find(target, root).record
    for directory in _outputs(record, _output_keys()):
        if (directory / METRICS_FILE).is_file():
            return _read(record.id, directory, root)
    raise _no_metrics(f"job {record.id} ({record.step}) wrote no {METRICS_FILE}")


def summary(run: TrainingRun) -> dict[str, Any]:
    """Return the figures of a run; None for those that it has not reached."""
    losses = run.series("lm_loss")
    seconds = sum(value for _, value in run.series("seconds"))
    tokens = sum(int(value) for _, value in run.series("tokens"))
    supervised = sum(int(value) for _, value in run.series("supervised_tokens"))
    work = sum(s["tflops_per_rank"] * s["seconds"] for s in run.steps.values() if _is_timed(s))
    memory = [value for _, value in run.series("peak_memory_bytes")]
    return {
        "name": run.name,
        "directory": str(run.directory),
        "status": run.status,
        "iterations": max(run.steps, default=0),
        "train_iters": run.config.get("train.train_iters"),
        "first_loss": losses[0][1] if losses else None,
        "last_loss": losses[-1][1] if losses else None,
        "first_valid_loss": run.validations[0][1] if run.validations else None,
        "last_valid_loss": run.validations[-1][1] if run.validations else None,
        "best_valid_loss": run.best[1] if run.best else None,
        "best_iteration": run.best[0] if run.best else None,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "supervised_tokens_per_second": supervised / seconds if seconds else None,
        "tflops_per_rank": work / seconds if seconds else None,
        "peak_memory_bytes": int(max(memory)) if memory else None,
        "saves": [{"iteration": iteration, "directory": where} for iteration, where in run.saves],
        "events": [
            {"time": each.time, "iteration": each.iteration, "text": each.text}
            for each in run.timeline
        ],
    }


def config_difference(run: TrainingRun, other: TrainingRun) -> dict[str, tuple[Any, Any]]:
    """Return what two runs were asked for differently, by key: the value of each, None if unset."""
    pairs = {
        key: (run.config.get(key), other.config.get(key))
        for key in sorted({*run.config, *other.config})
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _read(name: str, directory: Path, root: Path | None) -> TrainingRun:
    steps: dict[int, dict[str, float]] = {}
    validations: Points = []
    saves: list[tuple[int, str]] = []
    timeline: list[TimelineEntry] = []
    config: dict[str, Any] = {}
    for event in _events(directory / METRICS_FILE):
        kind, iteration = event.get("event"), event["iteration"]
        if kind == "step":
            steps[iteration] = {key: value for key, value in event.items() if _is_finite(value)}
        elif kind == "validation" and _is_finite(event.get("lm_loss")):
            validations.append((iteration, event["lm_loss"]))
        elif kind == "saved":
            # Where it lies now: the run's directory may have been moved since.
            save = Path(str(event.get("directory", ""))).name
            saves.append((iteration, str(directory / save) if save else ""))
        if isinstance(event.get("config"), dict):
            config = event["config"]
        text = _told(event)
        if text:
            time = event.get("time")
            timeline.append(TimelineEntry(time if _is_time(time) else 0.0, iteration, text))
    since = timeline[0].time if timeline else 0.0
    written_by = _since(since, _jobs_of(directory, root))
    timeline += [_end_of(record) for record in written_by if record.status in jobs.ENDED]
    shown = redact_data(config or (written_by[-1].config if written_by else {}))
    return TrainingRun(
        name=name,
        directory=directory,
        status=written_by[-1].status if written_by else None,
        config=dict(_leaves(shown)),
        steps=steps,
        validations=validations,
        saves=saves,
        timeline=sorted(timeline, key=lambda each: each.time),
    )


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events; a line that is incomplete, as after a kill, is left out."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("iteration"), int):
                yield event


def _told(event: Mapping[str, Any]) -> str:
    texts = {
        "started": "started",
        "resumed": f"resumed from {event.get('directory')}",
        "stopped": "stopped on request",
        "save_failed": f"save failed: {event.get('problem')}",
    }
    return texts.get(str(event.get("event")), "")


def _end_of(record: JobRecord) -> TimelineEntry:
    problem = f": [{record.error['code']}] {record.error['problem']}" if record.error else ""
    text = f"job {record.id} {record.status}{problem}"
    return TimelineEntry(_last_known(record), None, text)


def _jobs_of(directory: Path, root: Path | None) -> list[JobRecord]:
    """Return the records of the jobs that wrote to a directory, in the order of their ends."""
    records, keys = [job.record for job in jobs.list_jobs(root)], _output_keys()
    return sorted((each for each in records if directory in _outputs(each, keys)), key=_last_known)


def _since(time: float, records: list[JobRecord]) -> list[JobRecord]:
    """Return the jobs that wrote after a time; of those lost before it only what came last.

    Nobody knows when a lost job ended: it may have begun the run, or an earlier one.
    """
    before = [_unix(each.queued) for each in records if _unix(each.queued) <= time]
    return [
        each
        for each in records
        if _last_known(each) >= time
        or (each.status == "lost" and not each.ended and _unix(each.queued) == max(before))
    ]


def _output_keys() -> dict[str, list[str]]:
    """Return the keys that name what a step writes, by step."""
    return {
        step.id: [key for artifact in step.manifest.produces for key in artifact.keys]
        for step in catalog.find_steps()
    }


def _outputs(record: JobRecord, output_keys: Mapping[str, list[str]]) -> list[Path]:
    """Return the directories that a job's config names under the output keys of its step."""
    values = dict(_leaves(record.config))
    # The step may be one that this installation does not have.
    paths = [values.get(key) for key in output_keys.get(record.step, ())]
    return [(Path(record.directory) / path).resolve() for path in paths if isinstance(path, str)]


def _last_known(record: JobRecord) -> float:
    """Return when a job ended, infinity as long as it goes on; of a lost one, when it began."""
    if record.ended:
        return _unix(record.ended)
    return _unix(record.started or record.queued) if record.status in jobs.ENDED else math.inf


def _unix(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def _is_finite(value: object) -> TypeGuard[float]:
    """Return whether a recorded value is a number that can be drawn; a bad loss is null or NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < _LARGEST


def _is_time(value: object) -> TypeGuard[float]:
    return _is_finite(value) and 0 <= value < _LAST_TIME


def _is_timed(step: Mapping[str, Any]) -> bool:
    return "tflops_per_rank" in step and "seconds" in step


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _no_metrics(problem: str) -> NemotronError:
    return NemotronError(
        "no_metrics",
        problem,
        fix="pass a run of peft/megatron_bridge: its job, or its checkpoint.save directory",
        exit_code=ExitCode.DATA,
    )
