"""`mmi build`: portable graphs become engines for a card, or rewritten ones for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmi_deploy.commands.needs import extras
from mmi_deploy.commands.screen import print_json, remarks, results, size

if TYPE_CHECKING:
    from mmi_deploy.build.cache import EngineCache
    from mmi_deploy.build.report import TargetReport
    from mmi_deploy.build.target import Target
    from mmi_deploy.build.tensorrt_plan import Part, Request
    from mmi_deploy.bundle import Bundle


def build(
    bundle: Annotated[Path, typer.Argument(help="What `mmi export` wrote.")] = Path("bundles/tiny"),
    target: Annotated[
        str, typer.Option("--target", help="Who runs it: tensorrt, tensorrt-rtx or cpu.")
    ] = "tensorrt-rtx",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="The card, as in sm89; several may be given.",
            show_default="the card of this machine",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="A recipe: fp32, fp16, bf16, int8, int4, fp8, mixed.", show_default="fp16"
        ),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(help="Only this graph; several may be given.", show_default="all"),
    ] = None,
    plugin: Annotated[
        Path | None,
        typer.Option(
            help="Our plugin for TensorRT.", show_default="the one that `mmi plugins build` made"
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="The most rows that engines take.", show_default="the bundle's"),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(min=1, help="The most images in the pool.", show_default="the bundle's"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built, and what it takes.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Build again what is cached, and where memory or disk look too small."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the engines of a bundle for one kind of card or more, or its graphs for a CPU.

    Engines are cached by all that they depend on; what is unchanged is not built again. They go to
    engines/TARGET of the bundle, where TARGET names runtime, architecture and precision.
    """
    from mmi_deploy.bundle import Bundle

    with extras("build"):
        from mmi_deploy.build.precision import check_possible, recipe
    from mmi_deploy.build.target import CPU

    opened = Bundle.open(bundle)
    chosen = recipe(precision or ("fp32" if target == CPU else "fp16"))
    targets = _targets(target, arch, chosen.name)
    for one in targets:
        check_possible(chosen, one.runtime, one.architecture, graph)
    names = tuple(dict.fromkeys(graph or opened.graphs))
    request = _request(opened, targets, chosen, names, plugin, max_batch, max_images, force)
    _tensorrt(request, dry_run, as_json)


def _targets(runtime: str, architectures: list[str] | None, precision: str) -> tuple[Target, ...]:
    from mmi_deploy.build.target import CPU, Target
    from mmi_deploy.build.tensorrt import device_architecture

    if runtime == CPU:
        return (Target(CPU, architectures[0] if architectures else None, precision),)
    named = list(dict.fromkeys(architectures or filter(None, [device_architecture()])))
    if not named:
        return (Target(runtime, None, precision),)  # refused, with the list of those there are
    return tuple(Target(runtime, name, precision) for name in named)


def _request(
    bundle: Bundle,
    targets: tuple[Target, ...],
    recipe: Any,
    graphs: tuple[str, ...],
    library: Path | None,
    batch: int | None,
    images: int | None,
    force: bool,
) -> Request:
    from mmi_deploy.build.tensorrt import open_tensorrt
    from mmi_deploy.build.tensorrt_plan import Request
    from mmi_deploy.commands.tensorrt_plugin import plugin_for
    from mmi_deploy.graphs import Limits

    plugin = plugin_for(targets[0].runtime, library)
    for one in targets:
        trt = open_tensorrt(plugin, one.runtime, str(one.architecture))
    limits = bundle.limits
    narrowed = Limits(limits.context, batch or limits.batch, images or limits.images)
    return Request(bundle, targets, recipe, graphs, plugin, trt.__version__, narrowed, None, force)


def _tensorrt(request: Request, dry_run: bool, as_json: bool) -> None:
    from mmi_deploy.build.cache import EngineCache
    from mmi_deploy.build.tensorrt_plan import check_room, parts_of
    from mmi_deploy.build.tensorrt_target import build_targets

    cache = EngineCache.of_user()
    parts = parts_of(request)
    missing = [part for part in parts if request.force or not cache.has(part.key)]
    if dry_run:
        _say_plan(request, parts, missing, cache, as_json)
        return
    if missing:
        largest = max(missing, key=lambda part: part.memory)
        remarks().print(
            f"{len(missing)} of {len(parts)} engines to build; the largest, of {largest.graph}, "
            f"takes about {size(largest.memory)} of memory"
        )
    if not request.force:
        check_room(missing, request.bundle, cache)
    with _watched(len(parts)) as watch:
        reports = build_targets(request, cache, watch)
    if as_json:
        print_json(
            {"bundle": str(request.bundle.folder), "targets": [r.model_dump() for r in reports]}
        )
        return
    for report in reports:
        results().print(_table(report))
        results().print(f"{report.target}: {report.remark}")


def _say_plan(
    request: Request, parts: list[Part], missing: list[Part], cache: EngineCache, as_json: bool
) -> None:
    rows = [
        {
            "target": part.target.name,
            "graph": part.graph,
            "key": part.key,
            "cached": part not in missing,
            "weights_bytes": part.weights,
            "memory_bytes": part.memory if part in missing else 0,
            "disk_bytes": part.disk if part in missing else 0,
            "profiles": {profile.name: profile.record() for profile in part.profiles},
        }
        for part in parts
    ]
    if as_json:
        print_json(
            {
                "bundle": str(request.bundle.folder),
                "cache": str(cache.folder),
                "tensorrt": request.tensorrt,
                "plugin": request.plugin.identity,
                "parts": rows,
            }
        )
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("target", "graph", "profiles"):
        table.add_column(heading)
    for heading in ("weights", "memory"):
        table.add_column(heading, justify="right")
    for part in parts:
        names = ", ".join(profile.name for profile in part.profiles)
        memory = size(part.memory) if part in missing else "cached"
        table.add_row(part.target.name, part.graph, names, size(part.weights), memory)
    results().print(table)
    results().print(
        f"TensorRT {request.tensorrt}, plugin {request.plugin.identity}, cache {cache.folder}. "
        "Engines are built one after another, each in a process of its own"
    )


def _table(report: TargetReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=report.target, title_justify="left")
    table.add_column("graph")
    for heading in ("layers", "plugin", "weights", "engine", "seconds", "peak memory"):
        table.add_column(heading, justify="right")
    for graph in report.graphs:
        table.add_row(
            graph.graph,
            str(sum(graph.layers.values())),
            str(graph.plugin_layers),
            size(graph.weights_bytes),
            size(graph.engine_bytes),
            "cached" if graph.cached else f"{graph.seconds:.1f}",
            size(graph.peak_bytes),
        )
    return table


@contextmanager
def _watched(total: int) -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar with elapsed time and component n of N in a terminal, a line per component in a log."""
    console = remarks()
    if not console.is_terminal:
        said = ""

        def line(what: str, done: int, of: int, phase: str) -> None:
            nonlocal said
            if what != said:
                said = what
                console.print(f"{what} ({done + 1} of {of})")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=total, phase="")
        yield lambda what, done, of, phase: bar.update(
            task, description=what, completed=done, total=of, phase=phase
        )
