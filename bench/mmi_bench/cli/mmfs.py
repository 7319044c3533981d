"""`mmi bench mmfs`: the MMFS operator alone on the CPU."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmi_bench.cli.run_options import (
    MEASUREMENT,
    AsJson,
    Duration,
    ExportTimes,
    Iterations,
    Out,
    Threads,
    WarmUp,
    write_json,
    write_times,
)
from mmi_deploy.cli.console import counted, print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.progress import shown

# Preset whose language model is measured by default, at the published sizes.
PRESET = "paper_13b"


def mmfs(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle whose sizes are measured, or hf://org/name.", show_default=False
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Preset whose sizes are measured instead.",
            show_default=PRESET,
            rich_help_panel="Sizes",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(
            metavar="llm|image_decoder",
            help="Part of the model that the operator is in.",
            rich_help_panel="Sizes",
        ),
    ] = "llm",
    queries: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=65536,
            help="Queries of a call: tokens, or cells of a map; may be repeated.",
            metavar="N",
            show_default="1, 64, 2048, 4096",
            rich_help_panel="Sizes",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            help="Images that a query looks at.",
            metavar="N",
            show_default="4",
            rich_help_panel="Sizes",
        ),
    ] = None,
    warm_up: WarmUp = 200.0,
    duration: Duration = 3.0,
    iterations: Iterations = 10,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Smoke test: short runs of 1 and 64 queries.",
            rich_help_panel=MEASUREMENT,
        ),
    ] = False,
    threads: Threads = 2,
    out: Out = None,
    export_times: ExportTimes = None,
    as_json: AsJson = False,
) -> None:
    """Measure the MMFS operator alone on the CPU: our kernel, its ONNX function, GridSample.

    The three take turns and must agree with a float64 reference. GridSample does the sampling
    alone, with locations and weights precomputed. Times are those of `mmi bench graph`; those of a
    GPU's kernel: `python -m mmi_bench.gpu_check`.
    """
    if bundle and preset:
        raise ConfigError("a bundle and --preset were given", expected="one of them")
    for path in (out, export_times):
        if path:
            prepare_file(path)
    with extras("bench mmfs", "cpu,build"):
        from mmi_bench import kernel
        from mmi_plugins.conformance.onnxruntime_kernel import OnnxRuntimeKernel
    from mmi_bench.machine import describe
    from mmi_bench.runs import Settings
    from mmi_deploy.cli.inspect.source import graphs_of
    from mmi_deploy.spec.presets import preset as preset_called

    settings = Settings(warm_up / 1000, duration, iterations)
    if quick:
        settings = Settings(0.02, 0.2, kernel.TURNS)
    config = graphs_of(bundle, None).manifest.config if bundle else preset_called(preset or PRESET)
    shape = kernel.Shape.of(config, part, images)
    counts = sorted(set(queries or (kernel.QUERIES[:2] if quick else kernel.QUERIES)))
    ours = OnnxRuntimeKernel(threads=threads)
    if reason := ours.missing():
        raise EngineError(f"our kernel cannot run here: {reason}")
    machine = describe()
    done = []
    with shown(remarks()) as progress:
        for index, count in enumerate(counts):
            progress("measuring", index, len(counts), detail=f"{count} queries")
            done.append(kernel.compare(shape, count, ours.library, threads, settings))
    report = {
        "about": {
            "argv": sys.argv,
            "model": config.name,
            "part": part,
            "threads": threads,
            "settings": asdict(settings),
            "turns": kernel.TURNS,
            "machine": machine,
        },
        **kernel.report(done, shape),
    }
    if out:
        write_json(out, report)
    if export_times:
        write_times(export_times, [time for one in done for time in one.times()])
    if as_json:
        print_json(report)
        return
    console = results()
    print_table(console, kernel.table(done, shape))
    console.print(
        f"{config.name}, {part}; {machine['processor']}, {counted(threads, 'thread')}; in turns, "
        f"{settings.duration:g} s each; load before: {machine['load_before']:.1f}"
    )
