"""`mmi bench batch`: many documents at once against the same documents one after another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.cli.target_options import Device, Kernels, TargetName, check_engines
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown

MEASUREMENT, RESULTS = "Measurement", "Results"


def batch(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle that `mmi export` wrote, or hf://org/name.")
    ] = Path("bundles/tiny"),
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Workload: text, pictures or documents; may be repeated.",
            show_default="all",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=64,
            help="Documents at once; may be repeated.",
            metavar="N",
            show_default="1, 2, 4, 8",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Measurements of each row of the table.",
            metavar="N",
            rich_help_panel=MEASUREMENT,
        ),
    ] = 5,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Smoke test: short documents.", rich_help_panel=MEASUREMENT),
    ] = False,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="Judge by CPU time, on a machine that other processes disturb.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads of an engine.",
            metavar="N",
            rich_help_panel="Machine",
        ),
    ] = 2,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write every sample to this JSON file.",
            dir_okay=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot the speed-ups to this .svg or .png file.",
            dir_okay=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    target: TargetName = CPU,
    device: Device = 0,
    kernels: Kernels = AUTO,
    unproved: Annotated[
        bool,
        typer.Option(
            "--unproved", help="Run graphs that have no receipt.", rich_help_panel="Machine"
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=RESULTS)
    ] = False,
) -> None:
    """Compare documents at once with the same documents one after another.

    Text alone, pictures alone and whole documents; both sides take turns in one process. On the CPU
    the tokens and the PNG bytes of every document must equal those of its single run, or nothing is
    reported. The defaults take minutes.
    """
    if out:
        prepare_file(out)
    if plot:
        prepare_file(plot, ".svg", ".png")
    with extras("bench batch"):
        check_engines(target)
        from mmi_bench.batch.measure import run
        from mmi_bench.batch.report import print_report
        from mmi_bench.batch.workloads import WORKLOADS
    folder = local_folder(bundle, BUNDLE, targets=[target])
    with shown(remarks(), "loading") as progress:
        result = run(
            folder,
            workloads=workload or WORKLOADS,
            rows=rows or ((1, 2) if quick else (1, 2, 4, 8)),
            rounds=1 if quick else rounds,
            threads=threads,
            quick=quick,
            target=target,
            device=device,
            kernels=kernels,
            unproved=unproved,
            cpu_time=cpu_time,
            progress=progress,
        )
    report = result.to_json()
    if out:
        write_new_file(out, json.dumps(report, indent=2) + "\n")
    if plot:
        from mmi_bench.batch.plot import draw

        draw(result, plot)
    if as_json:
        print_json(report)
    else:
        print_report(results(), result)
