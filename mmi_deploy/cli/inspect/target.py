"""`mmi inspect target`: one target of a bundle, graph by graph; without a name, all targets.

With `--plan`, the kernels of its engines (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mmi_deploy.cli.console import print_json, print_table, results
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.cli.inspect.plan import show_plan
from mmi_deploy.cli.inspect.source import AsJson, BundleFolder
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.hub.reference import is_reference
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from mmi_deploy.bundle.build_report import GraphReport, TargetSummary
    from mmi_deploy.bundle.bundle import Bundle

# Layer types shown per graph, most frequent first.
SHOWN = 8


def target(
    folder: BundleFolder,
    name: Annotated[
        str | None, typer.Argument(help="Target, such as cpu-int8.", show_default="all, in a table")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the kernels of its engines, and what they move.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU for the times of --plan, such as l4.",
            show_default="one of its architecture",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one target of a bundle: per graph its layers, sizes, build time and receipt."""
    from mmi_deploy.bundle.build_report import WITHOUT_PLANS, describe_targets
    from mmi_deploy.bundle.bundle import Bundle

    if (plan or gpu) and (name is None or not plan):
        raise ConfigError("--plan shows one target, and --gpu belongs to it", fix="Give the target")
    local = local_folder(folder, BUNDLE, targets=None if name is None else [name])
    bundle = Bundle.open(local, unproved=True)
    if name is not None:
        if plan:
            show_plan(summary_of(bundle, name), gpu, as_json)
        else:
            show_target(bundle, name, as_json)
        return
    targets = describe_targets(bundle)
    if as_json:
        hidden = {"report": WITHOUT_PLANS}
        print_json([summary.model_dump(mode="json", exclude=hidden) for summary in targets])
    elif targets:
        print_table(results(), target_table(targets))
    elif is_reference(folder):
        results().print(f"{spelled(folder)} has no target")
    else:
        results().print(f"{folder} has no target yet: `mmi build {folder} --target cpu` makes one")


def target_table(summaries: Sequence[TargetSummary]) -> Table:
    """One row per target: number of graphs, size, activations, receipts, and the remark up to its
    colon."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("target", no_wrap=True)
    for heading in ("graphs", "size", "activations", "proved"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("remark")
    for one in summaries:
        proved = sum(proof == "proved" for proof in one.receipts.values())
        table.add_row(
            one.target,
            str(len(one.graphs)),
            size(one.bytes),
            _activations(one),
            f"{proved} of {len(one.graphs)}",
            _remark(one).partition(":")[0],
        )
    return table


def _remark(one: TargetSummary) -> str:
    if one.stale and one.graphs:
        return f"stale, built from another export: {one.remark or 'build it again'}"
    return one.remark


def _activations(one: TargetSummary) -> str:
    """Narrowest float type of the inputs and outputs of a target's engines."""
    graphs = one.report.graphs if one.report else ()
    types = {name.lower() for graph in graphs for name in graph.bindings.values()}
    for name, shown in (("half", "float16"), ("bf16", "bfloat16"), ("float", "float32")):
        if types & {name, shown}:
            return shown
    return ""


def summary_of(bundle: Bundle, name: str) -> TargetSummary:
    """Summary of the target called `name`. Raises `ConfigError` that lists the targets."""
    from mmi_deploy.bundle.build_report import describe_targets

    found = {summary.target: summary for summary in describe_targets(bundle)}
    if name not in found:
        raise ConfigError(
            f"{bundle.folder} has no target {name!r}",
            expected=" or ".join(found) or "one that `mmi build` made",
        )
    return found[name]


def show_target(bundle: Bundle, name: str, as_json: bool) -> None:
    """Print one target: per graph its layers, sizes, build time, peak memory and receipt."""
    from mmi_deploy.bundle.build_report import WITHOUT_PLANS

    summary = summary_of(bundle, name)
    if as_json:
        print_json(summary.model_dump(mode="json", exclude={"report": WITHOUT_PLANS}))
        return
    out = results()
    print_table(out, target_table([summary]))
    if _remark(summary):
        out.print(_remark(summary))
    for receipt in summary.answers:
        out.print(f"answers: {receipt.in_words()}", markup=False)
    if summary.report is None:
        out.print("It has no build report with details")
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("graph", no_wrap=True)
    for heading in ("engine", "weights", "built in", "peak memory", "error", "receipt"):
        table.add_column(heading, justify="right")
    for graph in summary.report.graphs:
        table.add_row(
            graph.graph,
            size(graph.engine_bytes),
            size(graph.weights_bytes),
            f"{graph.seconds:.0f} s",
            size(graph.peak_bytes) if graph.peak_bytes else "",
            "" if graph.error is None else f"{graph.error:.1e}",
            summary.receipts.get(graph.graph, "none"),
        )
    print_table(out, table)
    for graph in summary.report.graphs:
        out.print(Text.assemble((graph.graph, "bold"), f": {_layers(graph)}"))


def _layers(graph: GraphReport) -> str:
    most = sorted(graph.layers.items(), key=lambda item: -item[1])
    named = ", ".join(f"{count} {kind}" for kind, count in most[:SHOWN])
    more = f" and {len(most) - SHOWN} more types" if len(most) > SHOWN else ""
    ours = f"; {graph.plugin_layers} of our plugin" if graph.plugin_layers else ""
    warnings = f"; {len(graph.warnings)} warnings, see --json" if graph.warnings else ""
    return f"layers: {named}{more}{ours}{warnings}"
