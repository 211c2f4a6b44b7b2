"""``nemotron profiles list | show | init | check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from nemotron import launch, preflight, profile
from nemotron.cli import render
from nemotron.cli.options import Debug, Json
from nemotron.errors import raise_all

app = typer.Typer(
    help="Profiles say where jobs run: list, show, init, check.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ProfileName = Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile.")]


@app.command("list")
def list_profiles(as_json: Json = False, debug: Debug = False) -> None:
    """List the profiles that apply in this directory."""
    rows = render.profile_rows(profile.read_tables(Path.cwd()))
    print(json.dumps(rows, indent=2) if as_json else render.profile_table(rows))


@app.command("show")
def show_profile(name: ProfileName, as_json: Json = False, debug: Debug = False) -> None:
    """Show a profile as a run would use it, resolved, with the origin of every value."""
    found = profile.load_profile(name)
    if as_json:
        print(json.dumps(render.profile_data(found), indent=2))
    else:
        print(render.profile_page(found))


@app.command("init")
def init_profile(
    executor: Annotated[Literal["local", "slurm", "lepton"], typer.Argument(help="Executor.")],
    debug: Debug = False,
) -> None:
    """Write profiles/EXECUTOR.toml, a template with a profile for every step, to edit."""
    print(f"wrote {profile.write_template(executor)}; next: nemotron profiles check {executor}")


@app.command("check")
def check_profile(name: ProfileName, as_json: Json = False, debug: Debug = False) -> int:
    """Ask a profile's cluster whether the profile would work; nothing is submitted."""
    checks = launch.check_profile(profile.load_profile(name))
    failures = preflight.failures(checks)
    if as_json:
        print(json.dumps([render.check_data(check) for check in checks], indent=2))
        return int(failures[0].exit_code) if failures else 0
    print("\n".join(render.check_lines(checks)))
    raise_all(failures)
    return 0
