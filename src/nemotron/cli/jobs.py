"""``nemotron jobs list | status | logs | cancel | wait | report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemotron import jobs, launch, report
from nemotron.cli import render
from nemotron.cli.options import Debug, Json
from nemotron.cli.terminal import last_lines, lasting, say, show
from nemotron.errors import NemotronError
from nemotron.launch import OnInterrupt

app = typer.Typer(
    help="The jobs that were run from this directory.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JobName = Annotated[
    str,
    typer.Argument(metavar="JOB", help="Job id, a unique part of it, or the scheduler's id."),
]


@app.command("list")
def list_jobs(as_json: Json = False, debug: Debug = False) -> None:
    """List the jobs, the newest last, as their schedulers see them."""
    found: list[jobs.Job] = []
    for path in jobs.job_directories():
        # A damaged record, or a cluster that does not answer, must not hide the other jobs.
        try:
            found.append(jobs.read_job(path))
            found[-1] = launch.refresh(found[-1])
        except NemotronError as error:
            say(f"note: {path.name}: {error.problem}")
    if as_json:
        print(json.dumps([job.record.model_dump(mode="json") for job in found], indent=2))
    else:
        print(render.job_table(found))


@app.command("status")
def show_status(job: JobName, as_json: Json = False, debug: Debug = False) -> None:
    """Show one job's record, as its scheduler sees it now."""
    found = jobs.find(job)
    try:
        found = launch.refresh(found)
    except NemotronError as error:  # as in the list: what was known last is better than nothing
        say(f"note: this is the last known state; {error.problem}")
    _show(found, as_json)


@app.command("logs")
def show_logs(
    job: JobName,
    follow: Annotated[
        bool,
        typer.Option(
            "-f", "--follow", help="Follow until the job has ended; exit with its exit code."
        ),
    ] = False,
    tail: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Show only the last N lines so far.")
    ] = None,
    on_interrupt: Annotated[
        OnInterrupt, typer.Option(help="What the first Ctrl-C does to a remote job.")
    ] = "leave",
    debug: Debug = False,
) -> int:
    """Print what a job printed."""
    found = jobs.find(job)
    stdout = lasting(sys.stdout) if follow else sys.stdout.buffer
    stdout = stdout if tail is None else last_lines(stdout, tail)
    console = launch.Console(argv=[], say=say, stdout=stdout, stderr=sys.stderr.buffer)
    return launch.logs(found, console, is_followed=follow, on_interrupt=on_interrupt) or 0


@app.command("cancel")
def cancel_job(job: JobName, as_json: Json = False, debug: Debug = False) -> None:
    """Cancel a job; one that has ended stays as it is."""
    _show(launch.cancel(jobs.find(job)), as_json)


@app.command("wait")
def wait_for_job(job: JobName, as_json: Json = False, debug: Debug = False) -> int:
    """Wait until a job has ended, and exit with the job's exit code."""
    found = jobs.find(job)
    code = launch.wait(found)
    if as_json:
        show(jobs.read_job(found.path).record.model_dump_json(indent=2))
    return code


@app.command("report")
def write_report(
    target: Annotated[str, typer.Argument(metavar="JOB|DIR", help="Job, or directory of a run.")],
    against: Annotated[
        str | None, typer.Option(metavar="JOB|DIR", help="Another run to compare with.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; default: report-NAME.html."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a training run's curves and figures as HTML; with --json, print the figures."""
    run = report.read_run(target)
    other = None if against is None else report.read_run(against)
    if as_json:
        print(json.dumps(report.report_data(run, other), indent=2))
    if output is not None or not as_json:
        path = report.write_page(run, other, output)
        print(path, file=sys.stderr if as_json else sys.stdout)


def _show(job: jobs.Job, as_json: bool) -> None:
    print(job.record.model_dump_json(indent=2) if as_json else render.job_page(job.record))
