"""`mmi build`: build engines for GPUs, or graphs of another precision for ONNX Runtime."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, local_only
from mmi_deploy.cli.target_options import Device
from mmi_deploy.errors import BundleError, ConfigError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.spec.backends import AUTO, backend
from mmi_deploy.system.entry_points import load
from mmi_deploy.system.files import size
from mmi_deploy.system.progress import Progress, shown

if TYPE_CHECKING:
    from mmi_deploy.bundle.build_report import TargetReport
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.spec.graphs import Limits
    from mmi_deploy.spec.target import Target
    from mmi_deploy.targets.cache import EngineCache
    from mmi_deploy.targets.calibration import Calibration
    from mmi_deploy.targets.precision import Recipe
    from mmi_deploy.targets.tensorrt_plan import EnginePlan, Request


# Entry point that returns a `mmi_deploy.targets.tensorrt_build.Plugin` for a backend, an
# architecture and the value of --plugin.
PLUGIN = "mmi_plugins.tensorrt.plugin:plugin_for"

# Values of --products.
OWN_PRODUCTS, TENSORRT_PRODUCTS = "plugin", "tensorrt"


def build(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="Bundle, as written by `mmi export`; with --dry-run, or hf://org/name."
        ),
    ] = Path("bundles/tiny"),
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Backend: tensorrt, tensorrt-rtx, cuda (ONNX Runtime) or cpu.",
            rich_help_panel="Target",
        ),
    ] = "tensorrt-rtx",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="GPU architecture, such as sm89; may be repeated.",
            show_default="the GPU of this machine",
            rich_help_panel="Target",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Recipe: fp32, fp16, bf16, int8, int4, int4-128, int4-awq, int4-awq-128 "
            "(scaled by recorded activations), fp8 or mixed.",
            show_default="fp16; int8 on the CPU",
            rich_help_panel="Target",
        ),
    ] = None,
    graph: Annotated[
        list[str] | None,
        typer.Option(
            help="Build only this graph; engines of other graphs stay. May be repeated.",
            show_default="all",
            rich_help_panel="Target",
        ),
    ] = None,
    plugin: Annotated[
        str,
        typer.Option(
            metavar="auto|ahead-of-time|FILE",
            help="MMFS plugin for TensorRT: the newest of `mmi plugins build`, compiled into the "
            "engines ahead of time, or a library file.",
            rich_help_panel="Target",
        ),
    ] = AUTO,
    products: Annotated[
        str,
        typer.Option(
            metavar="plugin|tensorrt",
            help="Who multiplies with int8, fp8 and int4 weights in TensorRT's engines: our "
            "plugin's kernels, or TensorRT's own.",
            rich_help_panel="Target",
        ),
    ] = OWN_PRODUCTS,
    rows: Annotated[
        int,
        typer.Option(
            min=1,
            help="Documents or pictures that one run of the engines may compute together. `mmi "
            "serve` computes several documents at once; engines for one take less memory.",
            metavar="N",
            rich_help_panel="Target",
        ),
    ] = 1,
    max_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of images of the engines.",
            show_default="the bundle's",
            metavar="N",
            rich_help_panel="Target",
        ),
    ] = None,
    device: Device = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the build plan with memory and disk; build nothing."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Ignore cached engines, and the checks of memory, disk space and kernels.",
        ),
    ] = False,
    unproved: Annotated[
        bool,
        typer.Option(
            "--unproved", help="Skip calibration: no range check, no comparison with the bundle."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build the engines of a bundle for one or more GPU architectures, or its graphs for ONNX
    Runtime, on a GPU or the CPU.

    Engines are cached; only changed ones are built. They are written to engines/TARGET of the
    bundle, where TARGET names backend, architecture and precision.
    """
    from mmi_deploy.bundle.bundle import Bundle, check_target

    with extras("build"):
        from mmi_deploy.targets.precision import check_possible, recipe
        from mmi_deploy.targets.tensorrt_plan import graph_of

    if not dry_run:
        local_only(bundle, "engines are written into the bundle")
    opened = Bundle.open(local_folder(bundle, BUNDLE, targets=None), unproved=unproved)
    row = backend(target)
    chosen = recipe(precision or row.default_precision)
    targets = _targets(target, arch, chosen.name, device)
    for one in targets:
        check_possible(chosen, one.runtime, one.architecture, graph)
        if not dry_run:
            check_target(opened, one.name)
    for name in graph or ():
        graph_of(opened, name)
    kept = _built(opened, targets)
    names = tuple(name for name in opened.graphs if not graph or name in {*graph, *kept})
    limits = replace(
        opened.limits,
        batch=rows,
        images=opened.limits.images if max_images is None else max_images,
    )
    if products not in (OWN_PRODUCTS, TENSORRT_PRODUCTS):
        raise ConfigError(
            "--products has no such value",
            expected=f"{OWN_PRODUCTS} or {TENSORRT_PRODUCTS}",
            got=products,
        )
    options = _Options(limits, plugin, products, device, force, unproved, dry_run, as_json)
    if row.plugin:
        _tensorrt(opened, targets, chosen, names, options)
    else:
        _onnxruntime(opened, targets[0], chosen, graph, options)


def _built(bundle: Bundle, targets: tuple[Target, ...]) -> set[str]:
    """Graphs that the targets already have engines for; these are kept up to date."""
    found: set[str] = set()
    for target in targets:
        with suppress(BundleError):  # of another export, or not there
            found |= set(bundle.target(target.name, unproved=True).graphs)
    return found


@dataclass(frozen=True)
class _Options:
    """Options of `mmi build` besides bundle, target and precision."""

    limits: Limits
    plugin: str
    products: str
    device: int
    force: bool
    unproved: bool
    dry_run: bool
    as_json: bool


def _targets(
    runtime: str, architectures: list[str] | None, precision: str, device: int
) -> tuple[Target, ...]:
    from mmi_deploy.spec.target import Target
    from mmi_deploy.targets.tensorrt_build import device_architecture

    if not backend(runtime).architectures:
        return (Target(runtime, architectures[0] if architectures else None, precision),)
    named = list(dict.fromkeys(architectures or filter(None, [device_architecture(device)])))
    if not named:
        return (
            Target(runtime, None, precision),
        )  # check_architecture refuses it and lists the choices
    return tuple(Target(runtime, name, precision) for name in named)


def _onnxruntime(
    bundle: Bundle,
    target: Target,
    recipe: Recipe,
    graphs: list[str] | None,
    options: _Options,
) -> None:
    """Build a target of ONNX Runtime. Reject options that do not apply to it."""
    on_gpu = backend(target.runtime).on_gpu
    inapplicable = {
        "--plugin": options.plugin != AUTO,
        "--products": options.products != OWN_PRODUCTS,
        "--device": options.device != 0,
        "--rows or --max-images": options.limits != replace(bundle.limits, batch=1),
        "--graph": on_gpu and bool(graphs),
    }
    kind = f"{target.runtime} targets" if on_gpu else "CPU targets"
    for option, given in inapplicable.items():
        if given:
            raise ConfigError(f"{option} does not apply to {kind}", fix="leave it out")
    if options.dry_run:
        plan = {
            "bundle": str(bundle.folder),
            "target": target.name,
            "graphs": [name for name in bundle.graphs if on_gpu or name in recipe.weights],
        }
        if options.as_json:
            print_json(plan)
        else:
            named = ", ".join(plan["graphs"]) or "no graph"
            results().print(f"{plan['target']}: {recipe.description}; rewrites {named}")
        return
    with shown(remarks()) as progress:
        report = (_cuda if on_gpu else _cpu)(bundle, recipe, progress, options)
    _say_reports(bundle, [report], options.as_json)


def _cpu(bundle: Bundle, recipe: Recipe, progress: Progress, options: _Options) -> TargetReport:
    from mmi_deploy.targets.cpu import build_cpu_target

    unproved, force = options.unproved, options.force
    return build_cpu_target(bundle, recipe, progress, unproved=unproved, force=force)


def _cuda(bundle: Bundle, recipe: Recipe, progress: Progress, options: _Options) -> TargetReport:
    from mmi_deploy.targets.cache import EngineCache
    from mmi_deploy.targets.cuda import build_cuda_target

    calibration = None
    if not options.unproved:
        calibration = _calibration(bundle, EngineCache.of_user(), progress, options)
    return build_cuda_target(bundle, recipe, calibration, progress)


def _calibration(
    bundle: Bundle, cache: EngineCache, progress: Progress, options: _Options
) -> Calibration:
    from mmi_deploy.system.memory import free_memory
    from mmi_deploy.targets.calibration import Calibration, check_can_run

    if not (options.unproved or options.force or options.dry_run):
        check_can_run(bundle, free_memory())
    return Calibration(bundle, cache.folder.parent / "ranges", progress)


def _tensorrt(
    bundle: Bundle,
    targets: tuple[Target, ...],
    recipe: Recipe,
    graphs: tuple[str, ...],
    options: _Options,
) -> None:
    from mmi_deploy.targets.cache import EngineCache
    from mmi_deploy.targets.calibration import needs_moments
    from mmi_deploy.targets.tensorrt import build_targets
    from mmi_deploy.targets.tensorrt_build import open_tensorrt
    from mmi_deploy.targets.tensorrt_plan import (
        Request,
        check_device,
        check_limits,
        check_resources,
        plan_engines,
    )

    cache, runtime = EngineCache.of_user(), targets[0].runtime
    check_limits(bundle, options.limits)
    plugin = load(PLUGIN)(runtime, str(targets[0].architecture), options.plugin)
    for one in targets:
        trt = open_tensorrt(plugin, one.runtime, str(one.architecture), options.device)
    plugin.load(trt).unregister()  # fail now, not after minutes of calibration
    with shown(remarks()) as progress:
        calibration = _calibration(bundle, cache, progress, options)
        measured = () if options.unproved or options.dry_run else graphs
        ranges = {
            name: calibration.ranges(name, recipe, runtime)
            if name in measured
            else calibration.known_ranges(name)
            for name in bundle.graphs
        }
        moments = {
            name: calibration.moments(name, recipe)
            if name in measured
            else calibration.known_moments(name)
            for name in recipe.weights
            if needs_moments(name, recipe)
        }
        request = Request(
            bundle, targets, recipe, graphs, plugin, trt.__version__, options.limits, ranges,
            None if options.unproved else calibration, options.force, options.device,
            options.products == OWN_PRODUCTS and plugin.products is not None, moments,
        )  # fmt: skip
        plans = plan_engines(request)
        missing = [plan for plan in plans if options.force or not cache.has(plan.key)]
        if not options.dry_run:
            _say_memory(missing, len(plans))
            if not options.force:
                check_resources(missing, bundle, cache)
                check_device(missing, options.device)
            reports = build_targets(request, cache, progress)
    if options.dry_run:
        _say_plan(request, plans, missing, cache, options.as_json)
    else:
        _say_reports(bundle, reports, options.as_json)


def _say_memory(missing: list[EnginePlan], of: int) -> None:
    if missing:
        largest = max(missing, key=lambda plan: plan.memory)
        remarks().print(
            f"{len(missing)} of {of} engines to build; the largest, of {largest.graph}, "
            f"takes about {size(largest.memory)} of memory"
        )


def _say_reports(bundle: Bundle, reports: list[TargetReport], as_json: bool) -> None:
    from mmi_deploy.bundle.build_report import WITHOUT_PLANS

    if as_json:
        targets = [report.model_dump(mode="json", exclude=WITHOUT_PLANS) for report in reports]
        print_json({"bundle": str(bundle.folder), "targets": targets})
        return
    for report in reports:
        results().print(_table(report))
        if report.remark:
            results().print(report.remark)
        if found := sum(len(graph.findings) for graph in report.graphs):
            results().print(
                f"{found} findings about its kernels: "
                f"`mmi inspect target {bundle.folder} {report.target} --plan`"
            )


def _say_plan(
    request: Request,
    plans: list[EnginePlan],
    missing: list[EnginePlan],
    cache: EngineCache,
    as_json: bool,
) -> None:
    rows = [
        {
            "target": plan.target.name,
            "graph": plan.graph,
            "key": plan.key,
            "cached": plan not in missing,
            "weights_bytes": plan.weights,
            "memory_bytes": plan.memory if plan in missing else 0,
            "disk_bytes": plan.disk if plan in missing else 0,
            "device_memory_bytes": plan.device_memory if plan in missing else 0,
            "profiles": {profile.name: profile.record() for profile in plan.profiles},
        }
        for plan in plans
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
        on_gpu = any(plan.device_memory for plan in plans)
        headings = ("weights", "memory to build", *(["on the GPU"] if on_gpu else []))
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for plan in plans:
            if plan.target == target:
                names = ", ".join(profile.name for profile in plan.profiles)
                memory = size(plan.memory) if plan in missing else "cached"
                device = [size(plan.device_memory) if plan in missing else ""] if on_gpu else []
                table.add_row(plan.graph, names, size(plan.weights), memory, *device)
        results().print(table)
    results().print(
        f"TensorRT {request.tensorrt}, plugin {request.plugin.identity}, cache {cache.folder}. "
        "Engines are built one after another, each in its own process"
    )


def _table(report: TargetReport) -> Table:
    on_gpu = report.architecture is not None
    table = Table(
        box=box.SIMPLE_HEAD, title=report.target, title_justify="left", collapse_padding=True
    )
    table.add_column("graph", no_wrap=True)
    headings = ("layers", "plugin", "weights", "engine", "time", "memory", "error")
    for heading in headings if on_gpu else ("nodes", "weights", "all", "time", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for graph in report.graphs:
        layers, seconds = str(sum(graph.layers.values())), f"{graph.seconds:.0f} s"
        error = "none" if graph.error is None else f"{graph.error:.1e}"
        sizes = size(graph.weights_bytes), size(graph.engine_bytes)
        if on_gpu:
            seconds = "cached" if graph.cached else seconds
            plugin, peak = str(graph.plugin_layers), size(graph.peak_bytes)
            table.add_row(graph.graph, layers, plugin, *sizes, seconds, peak, error)
        else:
            table.add_row(graph.graph, layers, *sizes, seconds, error)
    return table
