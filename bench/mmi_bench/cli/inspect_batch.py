"""`mmi inspect batch`: documents at once on GPUs, computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import duration, print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.source import (
    AsJson,
    Context,
    Folder,
    Gpus,
    Images,
    Precision,
    Preset,
    graphs_of,
    memory_model,
)

if TYPE_CHECKING:
    from mmi_bench.batch.roofline import AtOnce
    from mmi_deploy.batching.capacity import Capacity

BASIS = (
    "Computed, not measured on a GPU: the roofline time of a run (weights, KV cache, images and "
    "activations once over the bandwidth, or FLOPs over the peak rate) plus the host time, "
    "measured here with engines that compute nothing, sampling with top-p 0.9 included. Full "
    "caches; memory as `--slots auto` shares it, with 4.3 GB of encoded images or, where no "
    "slot fits beside these, fewer"
)


def inspect_batch(
    folder: Folder = None,
    preset: Preset = None,
    gpu: Gpus = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=64,
            metavar="N",
            help="Documents at once; may be repeated.",
            show_default="1, 4, 8, 16",
        ),
    ] = None,
    precision: Precision = None,
    context: Context = None,
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Show tokens and denoising steps a second of documents at once, and the slots that fit a GPU.

    Computed from the graphs and the vendors' figures, not measured.
    """
    with extras("inspect batch"):
        from mmi_bench.batch.host_time import host_time
        from mmi_bench.batch.roofline import at_once, slots_of, to_json
        from mmi_deploy.analysis.gpu_specs import gpu as gpu_called
        from mmi_deploy.targets.precision.recipes import recipe
    gpus = [gpu_called(name) for name in gpu or ("h100", "l4")]
    asked = recipe(precision) if precision else None
    counts = sorted(set(rows or (1, 4, 8, 16)))
    graphs = graphs_of(folder, preset)
    model = memory_model(graphs, context, counts[-1], images, on_cpu=False)
    built = memory_model(graphs, context, graphs.manifest.limits.batch, images, on_cpu=False)
    one = memory_model(graphs, context, 1, images, on_cpu=False)
    with remarks().status("measuring the host time"):
        hosts = {count: host_time(model.config, count) for count in counts}
    found = {}
    for each in gpus:
        chosen = asked or recipe(one.recipe_for(each.room).recipe)
        fit = slots_of(built, chosen, each, graphs.manifest.limits)
        found[each.name] = (
            each.title,
            chosen.name,
            at_once(model, chosen, each, counts, hosts),
            fit,
        )
    if as_json:
        print_json(
            {
                "model": model.config.name,
                "context": model.limits.context,
                "images": model.limits.images,
                "gpus": {
                    name: {"precision": kind, **to_json(rows_, fit)}
                    for name, (_, kind, rows_, fit) in found.items()
                },
            }
        )
        return
    out = results()
    for title, kind, at, fit in found.values():
        print_table(out, _table(f"{model.config.name} in {kind} on {title}", at, fit))
    out.print(BASIS)


def _table(title: str, found: list[AtOnce], fit: Capacity) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{title}: {fit.slots} slots fit beside {fit.images} encoded images",
        title_justify="left",
    )
    for heading in (
        "at once", "a decode run", "host", "tokens/s", "times", "bound by",
        "a step run", "host", "steps/s", "times", "bound by", "fits",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    first = found[0]
    for one in found:
        table.add_row(
            str(one.rows),
            duration(one.decode),
            duration(one.host.decode),
            f"{one.tokens_per_second:.0f}",
            f"{one.tokens_per_second / first.tokens_per_second:.2f}",
            one.limits[0],
            duration(one.denoise),
            duration(one.host.denoise),
            f"{one.steps_per_second:.0f}",
            f"{one.steps_per_second / first.steps_per_second:.2f}",
            one.limits[1],
            "yes" if one.rows <= fit.slots else "no",
        )
    return table
