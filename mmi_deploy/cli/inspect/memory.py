"""`mmi inspect memory`: memory by precision, which GPU holds it, and the precision that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import counted, print_json, print_table, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.source import (
    AsJson,
    Batch,
    Context,
    Folder,
    Gpus,
    Images,
    OnCpu,
    Precision,
    Preset,
    graphs_of,
    memory_model,
)
from mmi_deploy.cli.target_options import resident_groups
from mmi_deploy.errors import ConfigError
from mmi_deploy.system.files import size

if TYPE_CHECKING:
    from mmi_deploy.analysis.memory_estimate import Choice, Memory, Model

BASIS = (
    "Weights and documents are exact; the workspace is an estimate (values that are live at once, "
    "nothing fused), as is contexts: code, contexts and recordings of TensorRT's engines "
    "(assumed). A GPU fits when 1 GB is left for the driver (assumed), and 4 GB more for the "
    "system where the CPU shares the memory"
)


def memory(
    folder: Folder = None,
    preset: Preset = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="24GB",
            help="Choose the precision for this much memory, or for a GPU.",
            show_default=False,
        ),
    ] = None,
    precision: Precision = None,
    gpu: Gpus = None,
    context: Context = None,
    batch: Batch = 1,
    images: Images = None,
    resident: Annotated[
        str | None,
        typer.Option(
            metavar="encoder,llm",
            help="Engine groups to keep in memory; the others are swapped in. none: swap all.",
            show_default="all",
        ),
    ] = None,
    on_cpu: OnCpu = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory by precision, and the GPU that it fits; with --fit, choose the precision."""
    if fit and (precision or resident or gpu):
        raise ConfigError(
            "--fit chooses precision and residency",
            fix="leave out --precision, --resident and --gpu",
        )
    with extras("inspect memory"):
        import mmi_deploy.analysis.memory_estimate  # noqa: F401
    model = memory_model(graphs_of(folder, preset), context, batch, images, on_cpu)
    if fit:
        show_fit(model, fit, as_json)
    else:
        show_memory(model, precision=precision, resident=resident, gpus=gpu or (), as_json=as_json)


def show_memory(
    model: Model,
    *,
    precision: str | None,
    resident: str | None,
    gpus: Sequence[str],
    as_json: bool,
) -> None:
    """Print one row per recipe: its memory, and the GPUs that it fits."""
    from mmi_deploy.spec.backends import BACKENDS
    from mmi_deploy.targets.precision.recipes import RECIPES, recipe

    wanted = (
        [recipe(precision)]
        if precision
        else [r for r in RECIPES.values() if BACKENDS[model.runtime].on_gpu or r.on_cpu]
    )
    memories = [model.memory(one, resident_groups(resident)) for one in wanted]
    if as_json:
        print_json(
            {
                **_about(model),
                "recipes": [{**as_dict(memory), **_holding(memory, gpus)} for memory in memories],
            }
        )
        return
    out = results()
    print_table(out, _overview(model, memories, gpus))
    if precision:
        out.print(_detail(memories[0]))
    out.print(BASIS)


def show_fit(model: Model, budget: str, as_json: bool) -> None:
    """Print the recipe for `budget`: an amount of free memory, or the name of a GPU."""
    from mmi_deploy.analysis.gpu_specs import GPUS
    from mmi_deploy.analysis.memory_estimate import parse_bytes

    room = GPUS[budget].room if budget in GPUS else parse_bytes(budget)
    choice = model.recipe_for(room)
    if as_json:
        report = {"recipe": choice.recipe, "resident": choice.resident, "spare": choice.spare}
        print_json({**_about(model), **report, **as_dict(choice.memory)})
        return
    results().print(
        f"{model.config.name} in {budget}: build it with --precision {choice.recipe}"
        f"{_residency(choice)}. It takes {size(choice.memory.total)}, of which weights "
        f"{size(choice.memory.weights)}, the document "
        f"{size(sum(choice.memory.documents.values()))}, the workspace "
        f"{size(choice.memory.workspace)} and contexts {size(choice.memory.overhead)} (estimates); "
        f"{size(choice.spare)} are left"
    )


def _residency(choice: Choice) -> str:
    if choice.resident is None:
        return " and keep all engines in memory"
    if not choice.resident:
        return " and run it with --resident none (engines swapped in)"
    return f" and run it with --resident {','.join(choice.resident)}"


def as_dict(memory: Memory) -> dict[str, Any]:
    """Memory in bytes for `--json`."""
    return {
        "recipe": memory.recipe,
        "resident": memory.resident,
        "bytes": memory.total,
        "weights": memory.weights,
        "workspace": memory.workspace,
        "contexts": memory.overhead,
        "documents": dict(memory.documents),
        "graphs": {
            graph.graph: {"weights": graph.weights, "workspace": graph.workspace}
            for graph in memory.graphs
        },
    }


def _about(model: Model) -> dict[str, Any]:
    limits = model.limits
    return {
        "model": model.config.name,
        "runtime": model.runtime,
        "context": limits.context,
        "batch": limits.batch,
        "images": limits.images,
    }


def _holding(memory: Memory, gpus: Sequence[str]) -> dict[str, Any]:
    return {"holds": holders(memory, gpus)}


def holders(memory: Memory, gpus: Sequence[str]) -> dict[str, bool]:
    """Common memory sizes and named GPUs -> True if `memory` fits beside the assumed reserve."""
    from mmi_deploy.analysis.gpu_specs import DRIVER_RESERVE, GB, SIZES, gpu

    rooms: Mapping[str, int] = {f"{gb} GB": gb * GB - DRIVER_RESERVE for gb in SIZES}
    named = {name: gpu(name).room for name in gpus}
    return {name: memory.total <= room for name, room in {**rooms, **named}.items()}


def _overview(model: Model, memories: Sequence[Memory], gpus: Sequence[str]) -> Table:
    limits, resident = model.limits, memories[0].resident
    stay = "all engines in memory" if resident is None else f"{', '.join(resident) or 'none'} stay"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{model.config.name} on {model.runtime}: {counted(limits.batch, 'document')} of "
        f"{limits.context} tokens, {counted(limits.images, 'image')}; {stay}",
        title_justify="left",
    )
    table.add_column("precision", no_wrap=True)
    for heading in ("weights", "documents", "workspace", "contexts", "total", "a GPU of", *gpus):
        table.add_column(heading, justify="right", no_wrap=True)
    for memory in memories:
        held = holders(memory, gpus)
        anonymous = [name for name, fits in held.items() if fits and name not in gpus]
        table.add_row(
            memory.recipe,
            size(memory.weights),
            size(sum(memory.documents.values())),
            f"~{size(memory.workspace)}",
            f"~{size(memory.overhead)}",
            size(memory.total),
            anonymous[0] if anonymous else f"> {list(held)[len(held) - len(gpus) - 1]}",
            *("yes" if held[name] else "no" for name in gpus),
        )
    return table


def _detail(memory: Memory) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("graph", "weights", "workspace"):
        table.add_column(heading, justify="left" if heading == "graph" else "right")
    for graph in memory.graphs:
        table.add_row(graph.graph, size(graph.weights), f"~{size(graph.workspace)}")
    table.add_section()
    for what, count in memory.documents.items():
        table.add_row(f"documents: {what}", size(count))
    return table
