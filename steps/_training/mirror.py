"""Copies the events in ``metrics.jsonl`` to TensorBoard or Weights & Biases, in its own process.

    python -m nemotron.steps._training.mirror --metrics FILE --offset N --every K tensorboard DIR

A tracker may be missing, refuse a value, hang in a connection, or crash its interpreter; in a
process of its own it cannot harm the run. The run has only started this process and holds the other
end of its stdin: when that closes, the run is over, the rest of the file is copied, and this
process ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Megatron's names, so that dashboards made for it find them.
STEP_TAGS = {
    "lm_loss": "lm loss",
    "grad_norm": "grad-norm",
    "learning_rate": "learning-rate",
    "seconds": "iteration-time",
    "consumed_samples": "samples vs steps",
    "tokens_per_second": "throughput/tokens_per_sec",
    "supervised_tokens_per_second": "throughput/supervised_tokens_per_sec",
    "tflops_per_rank": "throughput/tflops/device",
    "peak_memory_bytes": "memory/peak-bytes",
}
_POLL_SECONDS = 0.5
# After the run: long enough for an upload, and no process is left behind by one that hangs.
_LAST_SECONDS = 60


class Tracker(Protocol):
    """A service that keeps the values of a run."""

    def start(self, event: Mapping[str, Any]) -> None:
        """Begin with the ``started`` or ``resumed`` event of the run."""
        ...

    def write(self, iteration: int, seconds: float, values: Mapping[str, float]) -> None:
        """Add the values of an iteration, recorded at a Unix time."""
        ...

    def close(self) -> None:
        """Deliver all that was written."""
        ...


class TensorBoard:
    """Event files in a directory.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: The directory cannot be written.
    """

    def __init__(self, directory: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events: Any = event_pb2  # its classes are made when it is imported
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(directory, flush_secs=10)

    def start(self, event: Mapping[str, Any]) -> None:
        # From this step on, values of the run before it was resumed are no longer shown.
        kinds = self._events.SessionLog
        start = self._events.Event(
            step=event["iteration"] + 1,
            wall_time=event["time"],
            session_log=kinds(status=kinds.START),
        )
        self._writer.add_event(start)

    def write(self, iteration: int, seconds: float, values: Mapping[str, float]) -> None:
        kind = self._summaries.Summary
        summary = kind(value=[kind.Value(tag=t, simple_value=v) for t, v in values.items()])
        event = self._events.Event(step=iteration, wall_time=seconds, summary=summary)
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of a project, continued when the run is resumed; gets nothing but metrics and config.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(
        self, project: str, *, name: str, entity: str | None, directory: str | None
    ) -> None:
        import wandb

        self._wandb = wandb
        self._place = {"project": project, "name": name, "entity": entity, "dir": directory}
        self._run: Any = None

    def start(self, event: Mapping[str, Any]) -> None:
        # No code, command line or host: nothing is uploaded but what is passed here.
        settings = self._wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = self._wandb.init(
            **self._place,
            id=event["run"],
            resume="allow",
            config=event["config"],
            settings=settings,
        )
        # wandb's own step cannot go back, but the iteration does when a run resumes from a save.
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, seconds: float, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def close(self) -> None:
        self._run.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """Copy until stdin closes; return 1, having said why, if the tracker failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--metrics", type=Path, required=True)
    parser.add_argument("--offset", type=int, required=True, help="bytes of it to skip")
    parser.add_argument("--every", type=int, required=True, help="steps between copied ones")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("tensorboard").add_argument("directory")
    wandb = kinds.add_parser("wandb")
    wandb.add_argument("project")
    for option in ("--name", "--entity", "--directory"):
        wandb.add_argument(option)
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the run, whose end also ends this process
    threading.excepthook = lambda _: None  # if a tracker's thread fails, its next call says so
    try:
        tracker = _tracker(arguments)
        copy(
            _follow(arguments.metrics, arguments.offset, _end_of_stdin()), tracker, arguments.every
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(
            f"warning: logging to {arguments.kind} has stopped: {reason}; the run continues, and "
            f"{arguments.metrics} has everything",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # without exit handlers, in which a tracker may wait for its connection
    return 0


def copy(events: Iterator[dict[str, Any]], tracker: Tracker, every: int) -> None:
    """Write the values of events, of steps only the first and every ``every``-th; then close."""
    for event in events:
        iteration = event["iteration"]
        is_passed_over = event["event"] == "step" and iteration % every and iteration != 1
        if event["event"] in ("started", "resumed"):
            tracker.start(event)
        elif not is_passed_over and (values := values_of(event)):
            tracker.write(iteration, event["time"], values)
    tracker.close()


def values_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of an event that a tracker gets, by tag."""
    if event["event"] == "validation":
        loss = event["lm_loss"]
        return {"lm loss validation": loss, "lm loss validation ppl": math.exp(min(loss, 700.0))}
    if event["event"] == "step":
        return {tag: event[name] for name, tag in STEP_TAGS.items() if name in event}
    return {}


def _tracker(arguments: argparse.Namespace) -> Tracker:
    if arguments.kind == "tensorboard":
        return TensorBoard(arguments.directory)
    return WeightsAndBiases(
        arguments.project,
        name=arguments.name,
        entity=arguments.entity,
        directory=arguments.directory,
    )


def _follow(path: Path, offset: int, wait: Callable[[float], bool]) -> Iterator[dict[str, Any]]:
    """Yield the events of a growing file, until ``wait`` says that the run is over."""
    is_over, rest = False, b""
    with path.open("rb") as stream:
        stream.seek(offset)
        while True:
            *lines, rest = (rest + stream.read()).split(b"\n")
            yield from map(json.loads, lines)
            if is_over:
                return
            is_over = wait(_POLL_SECONDS)
            if is_over:
                signal.alarm(_LAST_SECONDS)


def _end_of_stdin() -> Callable[[float], bool]:
    """Return a function that waits for the end of stdin and returns whether it came in time."""
    over = threading.Event()

    def read() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=read, daemon=True).start()
    return over.wait


if __name__ == "__main__":
    raise SystemExit(main())
