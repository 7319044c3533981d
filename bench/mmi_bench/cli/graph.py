"""`mmi bench graph`: one graph of a bundle alone, in the words of TensorRT's trtexec."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmi_bench.cli.run_options import (
    MEASUREMENT,
    AsJson,
    Duration,
    ExportTimes,
    Iterations,
    Out,
    Seed,
    Threads,
    Unproved,
    WarmUp,
    write_json,
    write_times,
)
from mmi_deploy.cli.console import print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.cli.target_options import Device, Kernels, TargetName, check_engines
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.spec.backends import AUTO, CPU, NONE
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.progress import shown

SHIPPED = Path("bundles/tiny")


def graph(
    name: Annotated[
        str | None,
        typer.Argument(help="Graph, such as denoise_step, or all.", show_default=False),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle that `mmi export` wrote, or hf://org/name.", show_default=str(SHIPPED)
        ),
    ] = None,
    list_graphs: Annotated[
        bool, typer.Option("--list", help="List the graphs and their dimensions instead.")
    ] = False,
    sizes: Annotated[
        str,
        typer.Option(
            metavar="t=1,m=4",
            help="Sizes of dynamic dimensions, as in `mmi inspect cost`.",
            show_default="typical ones",
            rich_help_panel=MEASUREMENT,
        ),
    ] = "",
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Rows of a run: documents, pictures, or images to encode; may be repeated.",
            metavar="N",
            show_default="1",
            rich_help_panel=MEASUREMENT,
        ),
    ] = None,
    warm_up: WarmUp = 200.0,
    duration: Duration = 3.0,
    iterations: Iterations = 10,
    seed: Seed = 0,
    out: Out = None,
    export_times: ExportTimes = None,
    as_json: AsJson = False,
    target: TargetName = CPU,
    device: Device = 0,
    kernels: Kernels = AUTO,
    threads: Threads = 2,
    unproved: Unproved = False,
) -> None:
    """Measure one graph of a bundle alone, as trtexec measures an engine.

    Throughput, latency and its parts: enqueue, compute, and copies between host and device, of
    which the CPU has none. A percentile is shown from as many runs on as carry it: p90 from 44, p95
    from 90, p99 from 459.
    """
    from mmi_deploy.bundle.bundle import Bundle

    if list_graphs:
        # `mmi bench graph --list BUNDLE`
        folder = local_folder(bundle or Path(name or SHIPPED), BUNDLE)
        _list(Bundle.open(folder, unproved=unproved), as_json)
        return
    if name is None:
        raise ConfigError(
            "no graph was given",
            expected="`mmi bench graph NAME`, or `all`",
            fix="`mmi bench graph --list` lists them",
        )
    for path in (out, export_times):
        if path:
            prepare_file(path)
    with extras("bench graph"):
        check_engines(target)
        from mmi_bench.graph import ALL, named, print_report, run, sizes_of
    from mmi_bench.machine import describe
    from mmi_bench.runs import Settings
    from mmi_deploy.cli.inspect.cost import parse_sizes, within
    from mmi_deploy.runtime.backend import find_kernel_library
    from mmi_deploy.runtime.runtime import Runtime

    settings = Settings(warm_up / 1000, duration, iterations)
    folder = local_folder(bundle or SHIPPED, BUNDLE, targets=[target])
    opened = Bundle.open(folder, unproved=unproved)
    chosen = named(name, opened.graphs)
    given = parse_sizes(sizes, opened.graphs)
    wanted = [
        (one, found)
        for one in chosen
        for found in sizes_of(one, within(given, one) if name == ALL else given, rows or ())
    ]
    with shown(remarks(), "loading") as progress:
        library = find_kernel_library(target, kernels)
        runtime = Runtime.open(
            opened, target=target, kernels=library or NONE, threads=threads, device=device
        )
        about: dict[str, Any] = {
            "argv": sys.argv,
            "model": opened.config.name,
            "bundle_sha256": opened.identity,
            "target": target,
            "threads": threads,
            "kernels": library.name if library else NONE,
            "seed": seed,
            "settings": settings,
            "machine": describe(),
        }
        try:
            found = run(
                runtime,
                [(runtime.graphs[one.name], at) for one, at in wanted],
                settings,
                seed,
                progress,
            )
        finally:
            runtime.close()
    report = {
        "about": {**about, "settings": asdict(settings)},
        "graphs": [one.to_json() for one in found],
    }
    if out:
        write_json(out, report)
    if export_times:
        write_times(export_times, [time for one in found for time in one.times()])
    if as_json:
        print_json(report)
    else:
        print_report(results(), found, about)


def _list(bundle: Any, as_json: bool) -> None:
    from mmi_bench.graph import dimensions, list_table

    if as_json:
        print_json(dimensions(bundle.graphs))
    else:
        print_table(results(), list_table(bundle.graphs))
