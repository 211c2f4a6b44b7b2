"""Reports on a training run: its figures as data, its curves and events as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron.artifacts import write_text
from nemotron.errors import ExitCode, NemotronError
from nemotron.report.page import report_page
from nemotron.report.run import TrainingRun, config_difference, read_run, summary
from nemotron.tree import for_json

__all__ = ["TrainingRun", "read_run", "report_data", "write_page"]


def report_data(run: TrainingRun, against: TrainingRun | None = None) -> dict[str, Any]:
    """Return the figures of a run, or of two runs together with the difference of their configs."""
    difference = {} if against is None else config_difference(run, against)
    return for_json(
        {
            "run": summary(run),
            "against": None if against is None else summary(against),
            "config_difference": [
                {"key": key, "run": ours, "against": theirs}
                for key, (ours, theirs) in difference.items()
            ],
        }
    )


def write_page(run: TrainingRun, against: TrainingRun | None, path: Path | None) -> Path:
    """Write the page and return its path: ``path``, or a file here that is named after the runs.

    Raises:
        NemotronError: ``report_not_written``.
    """
    names = [run.name] if against is None else [run.name, against.name]
    path = path or Path(f"report-{'-against-'.join(names)}.html")
    try:
        write_text(path, report_page(run, against))
    except OSError as error:
        raise NemotronError(
            "report_not_written",
            f"{path} cannot be written: {error.strerror}",
            fix="pass -o FILE in a directory that exists and is writable",
            exit_code=ExitCode.IO,
        ) from None
    return path
