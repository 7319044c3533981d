"""Command line `mmi`: a table of commands, each imported on first use.

Exit codes: 0 success; 2 an error that the user can fix, in one line; 1 an unexpected error; 130
stopped by Ctrl-C; 143 stopped by SIGTERM.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mmi_deploy.cli import program
from mmi_deploy.cli.command_table import COMMANDS, TableGroup, table_app


class Mmi(TableGroup):
    """The commands of `mmi`."""

    rows = COMMANDS


app = table_app(Mmi, name="mmi", no_args_is_help=True)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version as installed_version

        typer.echo(f"mmi {installed_version('mmi_deploy')}")
        raise typer.Exit


@app.callback(
    epilog="First steps:\n\nmmi export assets/tiny -o bundles/tiny\n\n"
    "mmi generate examples/story.md -o out\n\nopen out/index.html"
)
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read and write interleaved text and pictures: train, export, run and measure MM-Interleaved.

    `mmi COMMAND --help` explains each command, with examples.
    """


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. Errors are one line on stderr."""
    try:
        return program.run(app, "mmi", arguments)
    except Exception as error:
        if "--debug" in arguments:
            raise
        line = " ".join(str(error).split()) or "no message"
        return program.say(
            f"unexpected {type(error).__name__}: {line}. Run it again as `mmi --debug ...` and "
            "report the traceback",
            1,
        )


def main() -> None:
    """Entry point of `mmi`."""
    program.main(run)
