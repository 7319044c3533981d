"""`mmi bench`: benchmark the runtime against the same weights in PyTorch."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.cli.target_options import Device, Kernels, TargetName
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE, MODEL
from mmi_deploy.runtime.backend import find_kernel_library
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown

if TYPE_CHECKING:
    from mmi_bench.compare.released_reading import Size

SHIPPED_BUNDLE, SHIPPED_MODEL = Path("bundles/tiny"), Path("assets/tiny")

READING = "released"
SIZES = ("small", "large")


def bench(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Bundle that `mmi export` wrote, or hf://org/name.",
            show_default=str(SHIPPED_BUNDLE),
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Model folder that the bundle was exported from, or hf://org/name.",
            show_default=str(SHIPPED_MODEL),
            rich_help_panel="Measurement",
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Model folder that --model was distilled from: PyTorch runs it, as published in "
            "20 steps with guidance, beside the runtime's few.",
            show_default=False,
            rich_help_panel="Measurement",
        ),
    ] = None,
    reading: Annotated[
        str | None,
        typer.Option(
            metavar=READING,
            help="Measure the released checkpoint's reading instead of a bundle, with random "
            "weights at --size.",
            show_default=False,
            rich_help_panel="A reading instead of a bundle",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SIZES),
            help="With --reading: 12 or 368 million parameters.",
            show_default=False,
            rich_help_panel="A reading instead of a bundle",
        ),
    ] = None,
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
            help="CPU threads of every backend.",
            metavar="N",
            rich_help_panel="Machine",
        ),
    ] = 2,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--no-compiled",
            help="Measure PyTorch with a U-Net compiled by torch.compile as well, which takes "
            "minutes to compile.",
            show_default="yes, unless --quick",
            rich_help_panel="Measurement",
        ),
    ] = None,
    cpu_time: Annotated[
        bool,
        typer.Option(
            "--cpu-time",
            help="Measure CPU time in place of latency, for a machine that other work shares; "
            "needs --threads 1, since waiting threads count.",
            rich_help_panel="Measurement",
        ),
    ] = False,
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

    All backends get the same weights, threads and counts and take turns. Unless they write the
    same text and draw the same pictures, nothing is reported; with --teacher, pictures are other
    ones, and only the amounts are the same. The defaults take minutes.

    With --reading, a model of the released checkpoint's structure is drawn and exported into a
    temporary folder (3 GB for large), then measured on one turn: 4 images, 16 tokens and a picture.
    This takes an hour on two cores; with --quick, ten minutes.
    """
    made = _size_of_reading(reading, size, bundle, model, target)
    if teacher is not None and made is not None:
        raise ConfigError("--reading draws a model that has no teacher", fix="omit --teacher")
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
    with extras("bench"):
        import torch  # noqa: F401  # reported here, before the process of the PyTorch backend fails

        from mmi_bench.compare.compare import run
        from mmi_bench.compare.report import print_report
    read: AbstractContextManager[tuple[Path, Path]]
    if not made:
        bundle = local_folder(bundle or SHIPPED_BUNDLE, BUNDLE, targets=[target])
        model = local_folder(model or SHIPPED_MODEL, MODEL)
        teacher = None if teacher is None else local_folder(teacher, MODEL)
    read = nullcontext((bundle or SHIPPED_BUNDLE, model or SHIPPED_MODEL))
    with shown(remarks(), "loading") as progress:
        if made:
            with extras("export"):
                from mmi_bench.compare.released_reading import placeholder_bundle, released_reading
            read = placeholder_bundle(released_reading(made), progress)
        with read as (bundle_folder, model_folder):
            comparison = run(
                bundle_folder,
                model_folder,
                threads=threads,
                repeats=repeats,
                quick=quick,
                schedule=schedule,
                library=find_kernel_library(target, kernels),
                unproved=unproved or made is not None,
                target=target,
                device=device,
                one_turn=made is not None,
                compiled=not quick if compiled is None else compiled,
                clock="cpu" if cpu_time else "wall",
                teacher=teacher,
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


def _size_of_reading(
    reading: str | None,
    size: str | None,
    bundle: Path | None,
    model: Path | None,
    target: str,
) -> Size | None:
    """Size of the reading to measure; None for a bundle. Raises `ConfigError` for options that
    contradict each other."""
    if reading is None:
        if size is not None:
            raise ConfigError(
                "--size is the size of a reading", fix=f"give --reading {READING}, or no --size"
            )
        return None
    if reading != READING:
        raise ConfigError("--reading cannot be measured", expected=READING, got=reading)
    if bundle is not None or model is not None:
        raise ConfigError(
            "--reading makes its own model and bundle",
            got=str(bundle) if bundle is not None else f"--model {model}",
            fix="give a bundle or --reading, not both",
        )
    if size not in SIZES:
        raise ConfigError(
            "--reading needs the size of the model",
            expected=" or ".join(f"--size {one}" for one in SIZES),
            got="none" if size is None else size,
        )
    if target != CPU:
        raise ConfigError(
            "the bundle of --reading has no engines", expected=f"--target {CPU}", got=target
        )
    return cast("Size", size)
