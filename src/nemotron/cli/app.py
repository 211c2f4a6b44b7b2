"""The command tree, and the one place where errors become text and exit codes."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import nemotron
from nemotron.cli import adapter, data, doctor, jobs, profiles, steps
from nemotron.cli.invocation import Invocation
from nemotron.cli.terminal import forget_reader, say
from nemotron.errors import NO_ROOM, ExitCode, NemotronError, system_refusal

app = typer.Typer(
    help=nemotron.__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(steps.app, name="steps")
app.add_typer(jobs.app, name="jobs")
app.add_typer(data.app, name="data")
app.add_typer(profiles.app, name="profiles")
app.add_typer(adapter.app, name="adapter")
app.command("doctor")(doctor.show_machine)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The arguments without the program; ``sys.argv`` by default.
    """
    invocation = Invocation(list(sys.argv[1:] if argv is None else argv))
    result = None
    try:
        _refuse_bytes(invocation.argv)
        result = app(invocation.words, prog_name="nemotron", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except (BrokenPipeError, SystemExit):  # typer makes the one the other
        forget_reader(sys.stdout)
    except Exception as error:
        return _fail(error, invocation)
    return result if isinstance(result, int) else int(ExitCode.OK)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(nemotron.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The root takes no other option: all of them stand after a command."""


def _refuse_bytes(argv: Sequence[str]) -> None:
    """Refuse arguments that cannot be written into a config or a record, which are UTF-8."""
    for word in argv:
        if not word.isprintable() and any("\ud800" <= char <= "\udfff" for char in word):
            raise NemotronError(
                "argument_invalid",
                f"{word!a} is not UTF-8",
                fix="rename the file, or export LC_ALL=C.UTF-8 if its name is UTF-8 already",
            )


def _fail(error: Exception, invocation: Invocation) -> int:
    """Print an error and return its exit code."""
    if invocation.is_debug:
        traceback.print_exception(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help
        print(error, file=sys.stderr)
        return int(ExitCode.USAGE)
    if not isinstance(error, NemotronError):
        # By duck typing: typer keeps its error classes in different modules in different versions.
        is_usage = hasattr(error, "format_message")
        error = _usage_error(error, invocation) if is_usage else _unexpected(error)
    if invocation.is_json:
        try:
            print(json.dumps({"error": error.to_dict()}, indent=2), flush=True)
            return int(error.exit_code)
        except OSError:  # stdout may be what has failed
            forget_reader(sys.stdout)
    say(str(error))
    return int(error.exit_code)


def _usage_error(error: Any, invocation: Invocation) -> NemotronError:
    """Return typer's error about the command line as one of ours."""
    command, is_group = _named_command(invocation.words)
    if type(error).__name__ != "NoSuchOption":
        return NemotronError(
            "usage", error.format_message().rstrip("."), fix=f"see {command} --help"
        )
    if is_group:
        fix = "put options after the command: nemotron steps run STEP -c NAME"
    else:
        fix = f"see {command} --help"
        if error.possibilities:
            fix = f"did you mean {' or '.join(error.possibilities)}?"
        if command.endswith("run"):
            fix += " (config values are key=value; arguments for the run module go after --)"
    return NemotronError("unknown_option", f"{command} has no option {error.option_name}", fix=fix)


def _named_command(words: Sequence[str]) -> tuple[str, bool]:
    """Return the command that the first words name, and whether it is a group of commands."""
    command: Any = typer.main.get_command(app)
    names = ["nemotron"]
    for word in words:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command = inner
        names.append(word)
    return " ".join(names), hasattr(command, "commands")


def _unexpected(error: Exception) -> NemotronError:
    if isinstance(error, OSError) and (refused := system_refusal(error, origin=_origin(error))):
        return refused
    return NemotronError(
        "unexpected",
        f"{type(error).__name__}: {error}",
        fix="this is a bug in nemotron; report it with the output of the same command with --debug",
        exit_code=ExitCode.IO if isinstance(error, OSError) else ExitCode.FAILED,
    )


def _origin(error: OSError) -> str:
    """Return what a system error is about that names no path, as far as that can be told."""
    try:
        os.getcwd()  # noqa: PTH109 - the question is whether there is one
    except OSError:
        return "the working directory"
    return "standard output" if error.errno in NO_ROOM else ""
