"""``nemotron steps list | show | run``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from nemotron import catalog, launch, plan, preflight
from nemotron.cli import render
from nemotron.cli.invocation import Invocation
from nemotron.cli.options import Debug, Json
from nemotron.cli.terminal import job_console, say, show
from nemotron.errors import NemotronError, raise_all
from nemotron.launch import OnInterrupt
from nemotron.profile import load_profile

app = typer.Typer(help="The steps: list, show, run.", no_args_is_help=True, rich_markup_mode=None)

StepName = Annotated[
    str, typer.Argument(metavar="STEP", help="Step id, or its last part if that is unique.")
]


@app.command("list")
def list_steps(
    category: Annotated[str | None, typer.Option(help="Only this category.")] = None,
    consumes: Annotated[
        str | None, typer.Option(help="Only steps that take this artifact type.")
    ] = None,
    produces: Annotated[
        str | None, typer.Option(help="Only steps that make this artifact type.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Only steps with this tag.")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Group by category.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the steps."""
    steps = catalog.select(
        catalog.find_steps(), category=category, consumes=consumes, produces=produces, tag=tag
    )
    if as_json:
        print(json.dumps([render.step_data(step) for step in steps], indent=2))
    elif tree:
        print(render.step_tree(steps))
    else:
        print(render.step_table(steps))


@app.command("show")
def show_step(step: StepName, as_json: Json = False, debug: Debug = False) -> None:
    """Show a step: its inputs, outputs, configs, parameters, strategies and errors."""
    found = catalog.find_step(step)
    if as_json:
        print(json.dumps(render.step_details(found), indent=2))
    else:
        print(render.step_page(found))


@app.command("run")
def run_step(
    context: typer.Context,
    step: StepName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that override the config's."),
    ] = None,
    config: Annotated[
        str, typer.Option("-c", "--config", metavar="NAME|PATH", help="Config of the step.")
    ] = catalog.DEFAULT_CONFIG,
    run: Annotated[
        str | None,
        typer.Option("-r", "--run", metavar="PROFILE", help="Run with this profile, attached."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("-b", "--batch", metavar="PROFILE", help="Run with this profile, detached."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("-d", "--dry-run", help="Print the plan; write and start nothing.")
    ] = False,
    force_squash: Annotated[
        bool, typer.Option("--force-squash", help="Import the container image again.")
    ] = False,
    on_interrupt: Annotated[
        OnInterrupt,
        typer.Option(help="What the first Ctrl-C does in an attached remote run."),
    ] = "ask",
    as_json: Json = False,
    debug: Debug = False,
) -> int:
    """Run a step. Arguments after -- go to its run module unchanged."""
    if run is not None and batch is not None:
        raise NemotronError(
            "options_exclude", f"-r {run} and -b {batch} cannot be combined", fix="pass one of them"
        )
    invocation: Invocation = context.obj
    name = run if run is not None else batch
    job = plan.build(
        catalog.find_step(step),
        config=config,
        overrides=overrides or [],
        profile=None if name is None else load_profile(name),
        is_detached=batch is not None,
        force_squash=force_squash,
        passthrough=invocation.passthrough,
    )
    if dry_run:
        return _print_plan(job, as_json)
    return _submit(job, ["nemotron", *invocation.argv], on_interrupt, as_json)


def _submit(
    job: plan.JobPlan, argv: Sequence[str], on_interrupt: OnInterrupt, as_json: bool
) -> int:
    """Run a plan and return the job's exit code; 0 for one that runs on, detached."""
    for note in job.notes:
        say(f"note: {note}")
    # With --json, stdout holds the record alone.
    stdout = sys.stderr if as_json else sys.stdout
    with job_console(argv, stdout=stdout) as console:
        submission = launch.submit(job, console, on_interrupt=on_interrupt)
    if as_json:
        show(submission.job.record.model_dump_json(indent=2))
    elif submission.exit_code is None:
        show(submission.job.record.id)
    return submission.exit_code or 0


def _print_plan(job: plan.JobPlan, as_json: bool) -> int:
    """Print a plan, its checks and its scripts; return 0, or the exit code of a failed check."""
    launch.refuse_secrets_in_plan(job)  # before anything of the plan is printed
    checks = preflight.check(job, dry_run=True)
    failures = preflight.failures(checks)
    scripts = {} if failures else launch.preview(job)
    if as_json:
        print(json.dumps(render.plan_data(job, checks) | {"scripts": scripts}, indent=2))
        return int(failures[0].exit_code) if failures else 0
    print(render.plan_text(job, checks))
    print(render.script_text(scripts), end="")
    sys.stdout.flush()
    raise_all(failures)
    return 0
