"""Options that the benchmarks of a graph and of the MMFS operator share, named as in trtexec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmi_deploy.cli.console import MOST_THREADS
from mmi_deploy.cli.target_options import MACHINE
from mmi_deploy.system.files import write_new_file

MEASUREMENT, RESULTS = "Measurement", "Results"

WarmUp = Annotated[
    float,
    typer.Option(
        "--warm-up",
        help="Milliseconds of runs before the measured ones.",
        metavar="MS",
        rich_help_panel=MEASUREMENT,
    ),
]
Duration = Annotated[
    float,
    typer.Option(
        help="Seconds of measurement, at least.", metavar="S", rich_help_panel=MEASUREMENT
    ),
]
Iterations = Annotated[
    int,
    typer.Option(help="Measured runs, at least.", metavar="N", rich_help_panel=MEASUREMENT),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**64 - 1,
        help="Seed of the inputs.",
        metavar="N",
        rich_help_panel=MEASUREMENT,
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="CPU threads of an engine.",
        metavar="N",
        rich_help_panel=MACHINE,
    ),
]
Unproved = Annotated[
    bool,
    typer.Option("--unproved", help="Run graphs that have no receipt.", rich_help_panel=MACHINE),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the results to this file.", rich_help_panel=RESULTS),
]
ExportTimes = Annotated[
    Path | None,
    typer.Option(
        "--export-times",
        help="Write the times of every run to this file, a JSON list with trtexec's keys.",
        rich_help_panel=RESULTS,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=RESULTS)]


def write_json(path: Path, value: Any) -> None:
    """Write a result to a new file."""
    write_new_file(path, json.dumps(value, indent=2) + "\n")


def write_times(path: Path, times: Sequence[Any]) -> None:
    """Write every run to a new file, a line each."""
    lines = ",\n".join(json.dumps(one) for one in times)
    write_new_file(path, f"[\n{lines}\n]\n")
