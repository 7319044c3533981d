"""`mmi inspect cost`: FLOPs and bytes of every graph, and the roofline time on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import duration, flops, print_json, print_table, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.source import AsJson, Folder, Gpus, Preset, graphs_of
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from mmi_deploy.analysis.cost import GraphCost, Total
    from mmi_deploy.analysis.gpu_specs import Gpu
    from mmi_deploy.spec.graphs import Graph

# Rows of the tables by operator and by module; `--json` has all of them and every node.
SHOWN = 12


FLOOR = (
    "Floor: weights, inputs and outputs once, nothing in between. Times are rooflines, computed "
    "from the vendor's figures and not measured"
)


def cost(
    folder: Folder = None,
    preset: Preset = None,
    graph: Annotated[
        str | None,
        typer.Option(help="Only this graph, by operator and module.", show_default="all"),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="t=1,m=4", help="Sizes of dynamic dimensions.")
    ] = "",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Recipe that weights are stored in: fp16, int8 ...", show_default="as exported"
        ),
    ] = None,
    gpu: Gpus = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a roofline plot, as .svg or .png.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show FLOPs, bytes and roofline time of every graph, or of one by operator and module."""
    from mmi_deploy.spec.graphs import graphs

    with extras("inspect cost"):
        import mmi_deploy.analysis.cost  # noqa: F401
    given = graphs_of(folder, preset)
    show_cost(
        given.name,
        given.files,
        graphs(given.manifest.config, given.manifest.limits),
        only=graph,
        sizes=sizes,
        precision=precision,
        gpus=gpu or (),
        as_json=as_json,
        plot=plot,
    )


def parse_sizes(text: str, contract: Mapping[str, Graph]) -> dict[str, int]:
    """Parse `t=1,m=4,n=4`. Raises `ConfigError` for anything but dynamic dimensions and sizes."""
    known = sorted({letter for graph in contract.values() for letter in graph.ranges})
    sizes = {}
    for part in filter(None, text.split(",")):
        letter, equals, number = (word.strip() for word in part.partition("="))
        if letter not in known or not equals or not number.isdecimal():
            raise ConfigError(
                f"--sizes: {part!r} is not a size",
                expected=f"LETTER=NUMBER with one of {', '.join(known)}",
                fix="for example --sizes t=1,m=4,n=4",
            )
        sizes[letter] = int(number)
    return sizes


def show_cost(
    title: str,
    files: Mapping[str, Path],
    contract: Mapping[str, Graph],
    *,
    only: str | None,
    sizes: str,
    precision: str | None,
    gpus: Sequence[str],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Print the cost of the graphs in `files`, or of the one called `only`."""
    from mmi_deploy.analysis.cost import cost_of_file
    from mmi_deploy.analysis.gpu_specs import GPUS, gpu
    from mmi_deploy.targets.precision.recipes import recipe

    if only is not None and only not in files:
        raise ConfigError(f"there is no graph {only!r}", expected=", ".join(files))
    given = parse_sizes(sizes, contract)
    chosen = [gpu(name) for name in gpus] or [GPUS["l4"], GPUS["h100"]]
    plan = recipe(precision) if precision else None
    costs = [
        cost_of_file(path, contract[name], given if only else within(given, contract[name]), plan)
        for name, path in files.items()
        if only in (None, name)
    ]
    if plot is not None:
        from mmi_deploy.cli.inspect.plot import draw_roofline

        draw_roofline(costs, chosen, plot)
    if as_json:
        print_json({"graphs": [as_dict(cost, chosen) for cost in costs]})
        return
    out = results()
    print_table(out, _overview(title, costs, chosen))
    if only is not None:
        print_table(out, _parts("operator", costs[0].by_operator()))
        print_table(out, _parts("module", costs[0].by_module()))
        at = " ".join(f"{letter}={number}" for letter, number in costs[0].sizes.items())
        bounds = ", ".join(f"{one.title}: {costs[0].bound(one)}" for one in chosen)
        out.print(f"At {at}. {costs[0].intensity:.1f} FLOPs per byte of the floor")
        out.print(f"Bound by: {bounds}")
    else:
        out.print("Sizes are typical ones; set them with --sizes t=1,m=4. Details: --graph NAME")
    out.print(FLOOR)


def within(given: Mapping[str, int], graph: Graph) -> dict[str, int]:
    """Those of the `given` sizes that a graph has, clamped to its ranges: sizes for several graphs
    at once."""
    return {
        letter: min(max(number, graph.ranges[letter].min), graph.ranges[letter].max)
        for letter, number in given.items()
        if letter in graph.ranges
    }


def as_dict(cost: GraphCost, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """Cost of one graph for `--json`."""
    total = cost.total
    return {
        "graph": cost.graph,
        "sizes": dict(cost.sizes),
        "stored": cost.storage,
        "computed_in": cost.compute,
        "matrix_flops": total.matrix,
        "vector_flops": total.vector,
        "bytes": {
            "floor": cost.floor_bytes,
            "weights": cost.weight_bytes,
            "inputs": cost.input_bytes,
            "outputs": cost.output_bytes,
            "node_by_node": total.bytes,
        },
        "flops_per_byte": cost.intensity,
        "roofline": {
            gpu.name: {
                "seconds": cost.seconds(gpu),
                "bound": cost.bound(gpu),
                "seconds_unfused": cost.seconds_unfused(gpu),
            }
            for gpu in gpus
        },
        "operators": {name: vars(part) for name, part in cost.by_operator().items()},
        "modules": {name: vars(part) for name, part in cost.by_module().items()},
        "nodes": [vars(node) for node in cost.nodes],
    }


def _overview(title: str, costs: Sequence[GraphCost], gpus: Sequence[Gpu]) -> Table:
    stored = costs[0].storage if costs[0].storage == "as exported" else f"in {costs[0].storage}"
    table = Table(box=box.SIMPLE_HEAD, title=f"{title}: cost of one run, {stored}")
    table.title_justify = "left"
    table.add_column("graph", no_wrap=True)
    headings = ("matrix\nFLOPs", "vector\nFLOPs", "floor", "node\nby node")
    for heading in (*headings, *(f"at least\n{gpu.name}" for gpu in gpus)):
        table.add_column(heading, justify="right", no_wrap=True)
    for cost in costs:
        total = cost.total
        table.add_row(
            cost.graph,
            flops(total.matrix),
            flops(total.vector),
            size(cost.floor_bytes),
            size(total.bytes),
            *(duration(cost.seconds(gpu)) for gpu in gpus),
        )
    return table


def _parts(what: str, totals: Mapping[str, Total]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(what, overflow="fold")
    for heading in ("nodes", "matrix\nFLOPs", "vector\nFLOPs", "node\nby node"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = list(totals.items())
    for name, total in rows[:SHOWN]:
        row = (flops(total.matrix), flops(total.vector), size(total.bytes))
        table.add_row(name or "(no weights)", str(total.nodes), *row)
    if len(rows) > SHOWN:
        table.add_row(f"and {len(rows) - SHOWN} more: see --json")
    return table
