"""`mmi bench`: benchmark the runtime against the same weights in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.target_options import Device, Kernels, TargetName
from mmi_deploy.runtime.backend import find_kernel_library
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown


def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `mmi export` wrote.")] = Path(
        "bundles/tiny"
    ),
    model: Annotated[
        Path,
        typer.Option(
            "--model",
            "-m",
            help="Model folder that the bundle was exported from.",
            rich_help_panel="Measurement",
        ),
    ] = Path("assets/tiny"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Smoke test with short documents.", rich_help_panel="Measurement"
        ),
    ] = False,
    repeats: Annotated[
        int,
        typer.Option(
            min=1, help="Measurements of each case.", metavar="N", rich_help_panel="Measurement"
        ),
    ] = 7,
    threads: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads of both backends.",
            metavar="N",
            rich_help_panel="Machine",
        ),
    ] = 2,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:STEPS",
            help="Sampler of the bundle.",
            show_default="the first of 20 steps",
            rich_help_panel="Measurement",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write every sample to this JSON file.",
            dir_okay=False,
            rich_help_panel="Results",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Plot the result to this .svg or .png file.",
            dir_okay=False,
            rich_help_panel="Results",
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
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Results")
    ] = False,
) -> None:
    """Compare the runtime with PyTorch: whole documents, tokens, denoising steps, memory.

    Both backends get the same weights, threads and counts and take turns. Unless they write the
    same text and draw the same pictures, nothing is reported. The defaults take minutes.
    """
    if out:
        prepare_file(out)
    if plot:
        prepare_file(plot, ".svg", ".png")
    with extras("bench"):
        import torch  # noqa: F401  # reported here, before the process of the PyTorch backend fails

        from mmi_bench.compare.compare import run
        from mmi_bench.compare.report import print_report
    with shown(remarks(), "loading") as progress:
        comparison = run(
            bundle,
            model,
            threads=threads,
            repeats=repeats,
            quick=quick,
            schedule=schedule,
            library=find_kernel_library(target, kernels),
            unproved=unproved,
            target=target,
            device=device,
            progress=progress,
        )
    report = comparison.to_json()
    if out:
        write_new_file(out, json.dumps(report, indent=2) + "\n")
    if plot:
        from mmi_bench.compare.plot import draw

        draw(comparison, plot)
    if as_json:
        print_json(report)
    else:
        print_report(results(), comparison)
