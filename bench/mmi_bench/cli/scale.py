"""`mmi bench scale`: growth of time and memory with images, tokens, rows and denoising steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_bench.cli.run_options import (
    MEASUREMENT,
    RESULTS,
    AsJson,
    Out,
    Threads,
    Unproved,
    write_json,
)
from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.cli.target_options import Device, Kernels, TargetName, check_engines
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.progress import shown


class Missed(MmiError):
    """Growth beyond what is expected, with `--check`."""

    exit_code = 1


def scale(
    bundle: Annotated[
        Path, typer.Argument(help="Bundle that `mmi export` wrote, or hf://org/name.")
    ] = Path("bundles/tiny"),
    rounds: Annotated[
        int,
        typer.Option(help="Measurements of each point.", metavar="N", rich_help_panel=MEASUREMENT),
    ] = 7,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Smoke test: two rounds of a few points an axis.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="Measure CPU time, for a machine that other work shares; needs --threads 1.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Exit with 1 if an expectation is missed.",
            rich_help_panel=RESULTS,
        ),
    ] = False,
    out: Out = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot the growth to this .svg or .png file.", rich_help_panel=RESULTS),
    ] = None,
    as_json: AsJson = False,
    target: TargetName = CPU,
    device: Device = 0,
    kernels: Kernels = AUTO,
    threads: Threads = 2,
    unproved: Unproved = False,
) -> None:
    """Measure the growth of time and memory with images, tokens, rows and denoising steps.

    Encoding, prefill, a decoded token, a denoising step, a whole picture: fitted exponents with
    intervals, and a verdict against what is expected: linear in what is computed once per image,
    token, row or step, flat in the rest. The defaults take minutes.
    """
    if cpu_time and (threads > 1 or target.startswith("tensorrt")):
        raise ConfigError(
            "--cpu-time counts threads that wait",
            expected=f"--threads 1 and --target {CPU}",
            got=f"--threads {threads} and --target {target}",
        )
    if out:
        prepare_file(out)
    if plot:
        prepare_file(plot, ".svg", ".png")
    with extras("bench scale"):
        check_engines(target)
        from mmi_bench.scale.measure import run
        from mmi_bench.scale.report import print_report
    if plot:
        with extras("bench scale", "bench"):
            import matplotlib  # noqa: F401  # reported before the measurement
    folder = local_folder(bundle, BUNDLE, targets=[target])
    with shown(remarks(), "loading") as progress:
        result = run(
            folder,
            rounds=2 if quick else rounds,
            quick=quick,
            threads=threads,
            target=target,
            device=device,
            kernels=kernels,
            unproved=unproved,
            cpu_time=cpu_time,
            progress=progress,
        )
    report = result.to_json()
    if out:
        write_json(out, report)
    if plot:
        from mmi_bench.scale.plot import draw

        draw(result, plot)
    if as_json:
        print_json(report)
    else:
        print_report(results(), result)
    if check and (missed := result.missed):
        raise Missed(
            "growth is beyond what is expected: "
            + ", ".join(f"{one.quantity} by {one.axis}" for one in missed)
        )
