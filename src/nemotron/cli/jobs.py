"""``nemotron jobs list | status | logs | report``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from nemotron import jobs, report
from nemotron.cli import render

app = typer.Typer(
    help="The jobs that were run from this directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, errors included.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Job id, or a part that only it has.")]

_POLL_SECONDS = 0.2


@app.command("list")
def list_jobs(as_json: Json = False, debug: Debug = False) -> None:
    """List the jobs, the newest last."""
    found = jobs.list_jobs()
    if as_json:
        print(json.dumps([job.record.model_dump(mode="json") for job in found], indent=2))
    else:
        print(render.job_table(found))


@app.command("status")
def show_status(job: JobName, as_json: Json = False, debug: Debug = False) -> None:
    """Show one job's record."""
    record = jobs.find(job).record
    if as_json:
        print(record.model_dump_json(indent=2))
    else:
        print(render.job_page(record))


@app.command("logs")
def show_logs(
    job: JobName,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Print what a job printed."""
    found = jobs.find(job)
    with found.log.open("rb") as log:
        while True:
            # The record first: what is logged before the job ends is read after that.
            has_ended = jobs.read_job(found.path).record.status in jobs.ENDED
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
            if has_ended or not follow:
                return
            time.sleep(_POLL_SECONDS)


@app.command("report")
def write_report(
    target: Annotated[str, typer.Argument(metavar="JOB|DIR", help="Job, or directory of a run.")],
    against: Annotated[
        str | None, typer.Option(metavar="JOB|DIR", help="Another run, shown beside it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page; report-NAME.html by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a page of a training run's curves and figures; with --json, print the figures."""
    run = report.read_run(target)
    other = None if against is None else report.read_run(against)
    if as_json:
        print(json.dumps(report.report_data(run, other), indent=2))
    if output is not None or not as_json:
        path = report.write_page(run, other, output)
        print(path, file=sys.stderr if as_json else sys.stdout)
