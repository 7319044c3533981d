"""`mmi inspect`: what a preset, a model folder or a bundle is made of."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from mmi_deploy.commands.inspect_memory import show_fit, show_memory
from mmi_deploy.commands.needs import extras
from mmi_deploy.commands.screen import print_json, results, size
from mmi_deploy.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from mmi_deploy.build.memory import Model
    from mmi_deploy.bundle import Bundle
    from mmi_deploy.graphs import Graph
    from mmi_deploy.manifest import BundleManifest


def inspect(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A bundle or a model folder.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Instead: print a named configuration.", show_default=False)
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List inputs and outputs of every graph too.")
    ] = False,
    cost: Annotated[
        bool, typer.Option("--cost", help="FLOPs, bytes and roofline time of every graph.")
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="What it takes of a card, by precision; what holds it.")
    ] = False,
    removed: Annotated[
        bool,
        typer.Option("--removed", help="FLOPs beside those of the model as it was published."),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Which weights suffer most from few bits (--graph llm)."
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="One of the bundle's targets, by graph.", show_default=False),
    ] = None,
    cards: Annotated[
        bool,
        typer.Option("--cards", help="For every card: what fits it, and the times it cannot beat."),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="24GB", help="The precision for this much memory.", show_default=False
        ),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option(help="With --cost: one graph, by operator and module.", show_default=False),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="t=1,m=4", help="With --cost: sizes of dynamic dimensions.")
    ] = "",
    precision: Annotated[
        str | None,
        typer.Option(help="With --cost, --memory: as this recipe stores it.", show_default=False),
    ] = None,
    card: Annotated[
        list[str] | None,
        typer.Option(
            help="With --cost, --memory: a card; several may be given.", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="With --memory: tokens of a document.", show_default="the bundle's"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="With --memory: documents at a time.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="With --memory: images of a document.")] = 4,
    resident: Annotated[
        str | None,
        typer.Option(
            metavar="encoder,llm",
            help="With --memory: engines that stay in memory; the others take turns.",
            show_default="all",
        ),
    ] = None,
    on_cpu: Annotated[
        bool, typer.Option("--cpu", help="With --memory: on the CPU, not on a GPU.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw it too, as .svg or .png.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a bundle, a model folder or a preset is made of, and what it costs.

    Without an argument: the presets there are.
    """
    from mmi_deploy.config import to_json
    from mmi_deploy.presets import PRESETS
    from mmi_deploy.presets import preset as preset_called

    if folder and preset:
        raise ConfigError("a folder and --preset were given", expected="one of them")
    views = {
        "cost": cost,
        "memory": memory,
        "cards": cards,
        "fit": bool(fit),
        "removed": removed,
        "tensors": tensors,
        "sensitivity": sensitivity,
        "target": bool(target),
    }
    given = {
        "graph": graph,
        "sizes": sizes,
        "precision": precision,
        "card": card,
        "plot": plot,
        "context": context,
        "resident": resident,
        "cpu": on_cpu or None,
    }
    check_options(views, [name for name, value in given.items() if value not in (None, "", [])])
    if sensitivity:
        with extras("inspect --sensitivity"):
            from mmi_deploy.commands.inspect_sensitivity import show_sensitivity

            show_sensitivity(_bundle_folder(folder), graph or "llm", precision or "int4", as_json)
        return
    if target:
        from mmi_deploy.bundle import Bundle
        from mmi_deploy.commands.inspect_targets import show_target

        show_target(Bundle.open(_bundle_folder(folder), unproved=True), target, as_json)
        return
    if removed:
        with extras("inspect --removed"):
            from mmi_deploy.commands.inspect_removed import show_removed

            _, manifest, files = _graphs_of(folder, preset)
            show_removed(manifest, files, as_json)
        return
    if memory or fit or cards:
        with extras("inspect --memory"):
            model = _memory_model(folder, preset, context, batch, images, on_cpu)
            if cards:
                from mmi_deploy.commands.inspect_cards import show_cards

                show_cards(model, card or (), as_json)
            elif fit:
                show_fit(model, fit, as_json)
            else:
                show_memory(
                    model,
                    precision=precision,
                    resident=resident,
                    cards=card or (),
                    as_json=as_json,
                )
        return
    if cost:
        with extras("inspect --cost"):
            from mmi_deploy.commands.inspect_cost import show_cost
            from mmi_deploy.graphs import graphs

            name, manifest, files = _graphs_of(folder, preset)
            show_cost(
                name,
                files,
                graphs(manifest.config, manifest.limits),
                only=graph,
                sizes=sizes,
                precision=precision,
                cards=card or (),
                as_json=as_json,
                plot=plot,
            )
        return
    if preset:
        results().print(to_json(preset_called(preset)), markup=False, end="")
    elif folder is None:
        _presets(as_json, {name: (make.__doc__ or "").strip() for name, make in PRESETS.items()})
    elif (folder / "bundle.json").exists():
        _bundle(folder, tensors, as_json)
    elif (folder / "config.json").exists():
        _model(folder, as_json)
    else:
        raise ConfigError(
            f"{folder} is neither a bundle nor a model folder",
            expected="a folder that holds bundle.json or config.json",
        )


GOES_WITH = {
    "graph": ("cost", "sensitivity"),
    "sizes": ("cost",),
    "precision": ("cost", "memory", "sensitivity"),
    "card": ("cost", "memory", "cards"),
    "plot": ("cost",),
    "context": ("memory", "fit", "cards"),
    "resident": ("memory",),
    "cpu": ("memory", "fit"),
}
"""Option -> the views that it says something about."""


def check_options(views: Mapping[str, bool], given: Sequence[str]) -> None:
    """Raise `ConfigError` for more than one view, or an option that the view does not take."""
    asked = [name for name, wanted in views.items() if wanted]
    if len(asked) > 1:
        names = " and ".join(f"--{name}" for name in asked)
        raise ConfigError(f"{names} were given", expected="one of them")
    for name in given:
        if not set(asked) & set(GOES_WITH[name]):
            goes_with = " or ".join(f"--{view}" for view in GOES_WITH[name])
            raise ConfigError(f"--{name} says nothing here", expected=f"it with {goes_with}")


def _graphs_of(
    folder: Path | None, preset: str | None
) -> tuple[str, BundleManifest, dict[str, Path]]:
    """The name, the manifest and the graph files of a bundle. Nothing is hashed and no weight is
    read, so that a bundle of a hundred gigabytes is looked at in seconds."""
    from mmi_deploy.bundle import EXPORT, MANIFEST
    from mmi_deploy.manifest import BundleManifest, read_manifest
    from mmi_deploy.presets import preset as preset_called

    if folder is None and preset:
        preset_called(preset)
        folder = Path("bundles") / preset
        if not (folder / MANIFEST).exists():
            raise ConfigError(
                f"the graphs of {preset} are looked for in {folder}, and are not there",
                fix=f"make them, without weights: `{EXPORT} --preset {preset} --sparse-weights "
                f"-o {folder}`",
            )
    if folder is None:
        raise ConfigError("no graphs were given", expected="the folder of a bundle, or --preset")
    manifest = read_manifest(folder / MANIFEST, BundleManifest, EXPORT)
    return str(folder), manifest, {n: folder / path for n, path in manifest.graphs.items()}


def _bundle_folder(folder: Path | None) -> Path:
    if folder is None:
        raise ConfigError("no bundle was given", expected="the folder of one")
    return folder


def _memory_model(
    folder: Path | None,
    preset: str | None,
    context: int | None,
    batch: int,
    images: int,
    on_cpu: bool,
) -> Model:
    from mmi_deploy.build.memory import Model, with_limits
    from mmi_deploy.build.target import CPU, TENSORRT

    _, manifest, files = _graphs_of(folder, preset)
    limits = with_limits(manifest.limits, context, batch, min(images, manifest.limits.images))
    runtime = CPU if on_cpu else TENSORRT
    return Model(manifest.config, files, manifest.limits.context, limits, runtime)


def _presets(as_json: bool, presets: dict[str, str]) -> None:
    first_lines = {name: text.partition("\n")[0] for name, text in presets.items()}
    if as_json:
        print_json(first_lines)
        return
    table = _table("preset", "what it is")
    for name, text in first_lines.items():
        table.add_row(name, text)
    results().print(table)


def parameter_counts(path: Path) -> dict[str, int]:
    """Parameters of each part of a model, from the header of its safetensors file alone."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(length))
        counts: Counter[str] = Counter()
        for name, entry in header.items():
            if name != "__metadata__":
                counts[name.partition(".")[0]] += prod(entry["shape"])
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, struct.error):
        raise WeightsError(f"{path} is no safetensors file", fix="copy it again") from None
    return dict(counts)


def _model(folder: Path, as_json: bool) -> None:
    from mmi_deploy.config import read_config

    config = read_config(folder / "config.json")
    path = folder / "model.safetensors"
    counts = parameter_counts(path)
    total, file_size = sum(counts.values()), path.stat().st_size
    if as_json:
        print_json({"model": config.name, "parameters": counts, "bytes": file_size})
        return
    table = _table("part", ">parameters", ">share", title=escape(f"{folder}: {config.name}"))
    for part, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}", size(file_size))
    results().print(table)


def _bundle(folder: Path, tensors: bool, as_json: bool) -> None:
    from mmi_deploy.bundle import Bundle

    bundle = Bundle.open(folder, unproved=True)
    from mmi_deploy.build.report import describe_targets

    targets = describe_targets(bundle)
    if as_json:
        told = [target.model_dump(mode="json") for target in targets]
        print_json({**bundle.manifest.model_dump(mode="json"), "targets": told})
        return
    out, limits = results(), bundle.limits
    out.print(
        f"[bold]{escape(str(folder))}[/bold]: {bundle.config.name}, context {limits.context}, "
        f"batch {limits.batch}, {limits.images} images; samplers {', '.join(bundle.schedules)}; "
        f"engines for {', '.join(bundle.targets) or 'no target beyond the portable graphs'}"
    )
    for remark in bundle.remarks:
        out.print(f"[yellow]{escape(remark)}[/yellow]")
    out.print(_graph_table(bundle))
    if targets:
        from mmi_deploy.commands.inspect_cost import print_table
        from mmi_deploy.commands.inspect_targets import target_table

        print_table(out, target_table(targets))
        out.print("--target NAME says more of one")
    for receipt in bundle.manifest.receipts:
        proof = escape(receipt.compared_with)
        out.print(f"[bold]{receipt.graph}[/bold] was compared with: {proof}")
    out.print(
        f"Files were checked by size and time, and hashed if these are new; `mmi verify "
        f"{escape(str(folder))}` hashes every byte"
    )
    if tensors:
        for graph in bundle.graphs.values():
            out.print(_tensor_table(graph))


def _graph_table(bundle: Bundle) -> Table:
    table = _table("graph", ">in", ">out", ">size", ">cases", ">worst error", ">allowed")
    for name, graph in bundle.graphs.items():
        own = bundle.manifest.graph_files(name).values()
        receipt = bundle.manifest.receipt(name)
        proof = ("none", "[red]no receipt[/red]", "")
        if receipt:
            worst = max(receipt.cases, key=lambda case: case.error / case.tolerance)
            proof = (str(len(receipt.cases)), f"{worst.error:.1e}", f"{worst.tolerance:.0e}")
        counts = (str(len(graph.inputs)), str(len(graph.outputs)))
        table.add_row(name, *counts, size(sum(entry.size for entry in own)), *proof)
    return table


def _tensor_table(graph: Graph) -> Table:
    ranges = ", ".join(
        f"{letter} {r.least}-{r.greatest}" for letter, r in sorted(graph.ranges.items())
    )
    table = _table("", "tensor", "type", "shape", title=f"{graph.name} ({ranges})")
    for side, listed in (("in", graph.inputs), ("out", graph.outputs)):
        for tensor in listed:
            shared = graph.in_place.get(tensor.name)
            place = f" in place of {shared}" if shared else ""
            shape = " × ".join(map(str, tensor.shape)) or "scalar"
            table.add_row(side, f"{tensor.name}{place}", tensor.dtype, shape)
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    """`>` before a heading aligns its column to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    return table
