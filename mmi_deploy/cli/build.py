"""`mmi build`: portable graphs become engines for a card, or rewritten ones for a CPU."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.kernels import AUTO
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.system.files import size
from mmi_deploy.system.progress import Progress, shown

if TYPE_CHECKING:
    from mmi_deploy.bundle.build_report import TargetReport
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.spec.graphs import Limits
    from mmi_deploy.spec.target import Target
    from mmi_deploy.targets.cache import EngineCache
    from mmi_deploy.targets.calibration import Evidence
    from mmi_deploy.targets.precision import Recipe
    from mmi_deploy.targets.tensorrt_plan import Part, Request


def build(
    bundle: Annotated[Path, typer.Argument(help="What `mmi export` wrote.")] = Path("bundles/tiny"),
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Who runs it: tensorrt, tensorrt-rtx or cpu.",
            rich_help_panel="What is built",
        ),
    ] = "tensorrt-rtx",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="The card, as in sm89; several may be given.",
            show_default="the card of this machine",
            rich_help_panel="What is built",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="A recipe: fp32, fp16, bf16, int8, int4, int4-128, fp8, mixed.",
            show_default="fp16; int8 on the CPU",
            rich_help_panel="What is built",
        ),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this graph, and what is there already; several may be given.",
            show_default="all",
            rich_help_panel="What is built",
        ),
    ] = None,
    plugin: Annotated[
        str,
        typer.Option(
            metavar="auto|ahead-of-time|FILE",
            help="Our plugin for TensorRT: what `mmi plugins build` made, inside the engines, or a "
            "library of your own.",
            rich_help_panel="What is built",
        ),
    ] = AUTO,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most rows that engines take.",
            show_default="the bundle's",
            metavar="N",
            rich_help_panel="What is built",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most images in the pool.",
            show_default="the bundle's",
            metavar="N",
            rich_help_panel="What is built",
        ),
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
    unproved: Annotated[
        bool,
        typer.Option(
            "--unproved", help="Leave out the range check and the comparison with the bundle."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the engines of a bundle for one kind of card or more, or its graphs for a CPU.

    Engines are cached by all that they depend on; what is unchanged is not built again. They go to
    engines/TARGET of the bundle, where TARGET names runtime, architecture and precision.
    """
    from mmi_deploy.bundle.bundle import Bundle, check_target

    with extras("build"):
        from mmi_deploy.targets.precision import check_possible, recipe
        from mmi_deploy.targets.tensorrt_plan import graph_of
    from mmi_deploy.spec.backends import backend
    from mmi_deploy.spec.graphs import Limits

    opened = Bundle.open(bundle, unproved=unproved)
    row = backend(target)
    chosen = recipe(precision or row.default_precision)
    targets = _targets(target, arch, chosen.name)
    for one in targets:
        check_possible(chosen, one.runtime, one.architecture, graph)
        if not dry_run:
            check_target(opened, one.name)
    for name in graph or ():
        graph_of(opened, name)
    kept = _built(opened, targets)
    names = tuple(name for name in opened.graphs if not graph or name in {*graph, *kept})
    limits = Limits(
        opened.limits.context,
        opened.limits.batch if max_batch is None else max_batch,
        opened.limits.images if max_images is None else max_images,
    )
    options = _Options(limits, plugin, force, unproved, dry_run, as_json)
    if row.on_gpu:
        _tensorrt(opened, targets, chosen, names, options)
    else:
        _cpu(opened, chosen, options)


def _built(bundle: Bundle, targets: tuple[Target, ...]) -> set[str]:
    """Graphs that the targets hold already: they stay beside the one that is asked for."""
    found: set[str] = set()
    for target in targets:
        with suppress(BundleError):  # of another export, or not there
            found |= set(bundle.target(target.name, unproved=True).graphs)
    return found


@dataclass(frozen=True)
class _Options:
    """What the command line says besides what to build."""

    limits: Limits
    plugin: str
    force: bool
    unproved: bool
    dry_run: bool
    as_json: bool


def _targets(runtime: str, architectures: list[str] | None, precision: str) -> tuple[Target, ...]:
    from mmi_deploy.spec.backends import backend
    from mmi_deploy.spec.target import Target
    from mmi_deploy.targets.tensorrt_build import device_architecture

    if not backend(runtime).on_gpu:
        return (Target(runtime, architectures[0] if architectures else None, precision),)
    named = list(dict.fromkeys(architectures or filter(None, [device_architecture()])))
    if not named:
        return (Target(runtime, None, precision),)  # refused, with the list of those there are
    return tuple(Target(runtime, name, precision) for name in named)


def _cpu(bundle: Bundle, recipe: Recipe, options: _Options) -> None:
    """Refuses options that mean nothing there, rather than leave them unheard."""
    from mmi_deploy.targets.cpu import build_cpu_target

    unheard = {
        "--plugin": options.plugin != AUTO,
        "--max-batch or --max-images": options.limits != bundle.limits,
    }
    for option, given in unheard.items():
        if given:
            raise ConfigError(f"the CPU target takes no {option}", fix="leave it out")
    if options.dry_run:
        plan = {
            "bundle": str(bundle.folder),
            "target": f"cpu-{recipe.name}",
            "graphs": [name for name in bundle.graphs if name in recipe.weights],
        }
        if options.as_json:
            print_json(plan)
        else:
            named = ", ".join(plan["graphs"]) or "no graph"
            results().print(f"{plan['target']}: {recipe.what}; rewrites {named}")
        return
    with shown(remarks()) as progress:
        report = build_cpu_target(
            bundle,
            recipe,
            progress,
            unproved=options.unproved,
            force=options.force,
        )
    _say_reports(bundle, [report], options.as_json)


def _evidence(
    bundle: Bundle, cache: EngineCache, progress: Progress, options: _Options
) -> Evidence:
    from mmi_deploy.system.memory import free_memory
    from mmi_deploy.targets.calibration import Evidence, check_can_run

    if not (options.unproved or options.force or options.dry_run):
        check_can_run(bundle, free_memory())
    return Evidence(bundle, cache.folder.parent / "ranges", progress)


def _tensorrt(
    bundle: Bundle,
    targets: tuple[Target, ...],
    recipe: Recipe,
    graphs: tuple[str, ...],
    options: _Options,
) -> None:
    from mmi_deploy.targets.cache import EngineCache
    from mmi_deploy.targets.tensorrt import build_targets
    from mmi_deploy.targets.tensorrt_build import open_tensorrt
    from mmi_deploy.targets.tensorrt_plan import Request, check_limits, check_room, parts_of
    from mmi_plugins.tensorrt.plugin import plugin_for

    cache, runtime = EngineCache.of_user(), targets[0].runtime
    check_limits(bundle, options.limits)
    plugin = plugin_for(runtime, str(targets[0].architecture), options.plugin)
    for one in targets:
        trt = open_tensorrt(plugin, one.runtime, str(one.architecture))
    plugin.load(trt).unregister()  # refused here, not after minutes
    with shown(remarks()) as progress:
        evidence = _evidence(bundle, cache, progress, options)
        measured = () if options.unproved or options.dry_run else graphs
        ranges = {
            name: evidence.ranges(name, recipe, runtime)
            if name in measured
            else evidence.known_ranges(name)
            for name in bundle.graphs
        }
        request = Request(
            bundle, targets, recipe, graphs, plugin, trt.__version__, options.limits, ranges,
            None if options.unproved else evidence, options.force,
        )  # fmt: skip
        parts = parts_of(request)
        missing = [part for part in parts if options.force or not cache.has(part.key)]
        if not options.dry_run:
            _say_memory(missing, len(parts))
            if not options.force:
                check_room(missing, bundle, cache)
            reports = build_targets(request, cache, progress)
    if options.dry_run:
        _say_plan(request, parts, missing, cache, options.as_json)
    else:
        _say_reports(bundle, reports, options.as_json)


def _say_memory(missing: list[Part], of: int) -> None:
    if missing:
        largest = max(missing, key=lambda part: part.memory)
        remarks().print(
            f"{len(missing)} of {of} engines to build; the largest, of {largest.graph}, "
            f"takes about {size(largest.memory)} of memory"
        )


def _say_reports(bundle: Bundle, reports: list[TargetReport], as_json: bool) -> None:
    if as_json:
        targets = [report.model_dump(mode="json") for report in reports]
        print_json({"bundle": str(bundle.folder), "targets": targets})
        return
    for report in reports:
        results().print(_table(report))
        if report.remark:
            results().print(report.remark)


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
    for target in request.targets:
        table = Table(box=box.SIMPLE_HEAD, title=target.name, title_justify="left")
        table.add_column("graph", no_wrap=True)
        table.add_column("profiles", no_wrap=True)
        for heading in ("weights", "memory to build"):
            table.add_column(heading, justify="right", no_wrap=True)
        for part in parts:
            if part.target == target:
                names = ", ".join(profile.name for profile in part.profiles)
                memory = size(part.memory) if part in missing else "cached"
                table.add_row(part.graph, names, size(part.weights), memory)
        results().print(table)
    results().print(
        f"TensorRT {request.tensorrt}, plugin {request.plugin.identity}, cache {cache.folder}. "
        "Engines are built one after another, each in a process of its own"
    )


def _table(report: TargetReport) -> Table:
    card = report.architecture is not None
    table = Table(
        box=box.SIMPLE_HEAD, title=report.target, title_justify="left", collapse_padding=True
    )
    table.add_column("graph", no_wrap=True)
    headings = ("layers", "plugin", "weights", "engine", "time", "memory", "error")
    for heading in headings if card else ("nodes", "weights", "all", "time", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for graph in report.graphs:
        layers, seconds = str(sum(graph.layers.values())), f"{graph.seconds:.0f} s"
        error = "none" if graph.error is None else f"{graph.error:.1e}"
        sizes = size(graph.weights_bytes), size(graph.engine_bytes)
        if card:
            seconds = "cached" if graph.cached else seconds
            plugin, peak = str(graph.plugin_layers), size(graph.peak_bytes)
            table.add_row(graph.graph, layers, plugin, *sizes, seconds, peak, error)
        else:
            table.add_row(graph.graph, layers, *sizes, seconds, error)
    return table
