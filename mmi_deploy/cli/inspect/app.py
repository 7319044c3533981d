"""`mmi inspect`: what a preset, a model folder or a bundle is made of, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.console import results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.memory import show_fit, show_memory
from mmi_deploy.cli.inspect.parts import show_bundle, show_model, show_presets
from mmi_deploy.errors import ConfigError

if TYPE_CHECKING:
    from mmi_deploy.analysis.memory_estimate import Model
    from mmi_deploy.bundle.manifest import BundleManifest


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
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="With --memory: documents at a time.", show_default="1"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="With --memory: images of a document.", show_default="4"),
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option(
            metavar="encoder,llm",
            help="With --memory: engines that stay in memory; the others take turns. none: all do.",
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
    from mmi_deploy.spec.config import to_json
    from mmi_deploy.spec.presets import PRESETS
    from mmi_deploy.spec.presets import preset as preset_called

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
        "batch": batch,
        "images": images,
        "resident": resident,
        "cpu": on_cpu or None,
    }
    check_options(views, [name for name, value in given.items() if value not in (None, "", [])])
    if sensitivity:
        with extras("inspect --sensitivity"):
            from mmi_deploy.cli.inspect.sensitivity import show_sensitivity

            show_sensitivity(_bundle_folder(folder), graph or "llm", precision or "int4", as_json)
        return
    if target:
        from mmi_deploy.bundle.bundle import Bundle
        from mmi_deploy.cli.inspect.target import show_target

        show_target(Bundle.open(_bundle_folder(folder), unproved=True), target, as_json)
        return
    if removed:
        with extras("inspect --removed"):
            from mmi_deploy.cli.inspect.flops_saved import show_removed

            _, manifest, files = _graphs_of(folder, preset)
            show_removed(manifest, files, as_json)
        return
    if memory or fit or cards:
        with extras("inspect --memory"):
            model = _memory_model(folder, preset, context, batch or 1, images, on_cpu)
            if cards:
                from mmi_deploy.cli.inspect.gpus import show_cards

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
            from mmi_deploy.cli.inspect.cost import show_cost
            from mmi_deploy.spec.graphs import graphs

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
    if tensors and not (folder and (folder / "bundle.json").exists()):
        raise ConfigError("--tensors says nothing here", expected="it with a bundle")
    if preset:
        results().print(to_json(preset_called(preset)), end="")
    elif folder is None:
        show_presets(
            as_json, {name: (make.__doc__ or "").strip() for name, make in PRESETS.items()}
        )
    elif (folder / "bundle.json").exists():
        show_bundle(folder, tensors, as_json)
    elif (folder / "config.json").exists():
        show_model(folder, as_json)
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
    "batch": ("memory", "fit", "cards"),
    "images": ("memory", "fit", "cards"),
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
    from mmi_deploy.bundle.bundle import EXPORT, MANIFEST
    from mmi_deploy.bundle.manifest import BundleManifest, read_manifest
    from mmi_deploy.spec.presets import preset as preset_called

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
    images: int | None,
    on_cpu: bool,
) -> Model:
    from mmi_deploy.analysis.memory_estimate import Model, with_limits
    from mmi_deploy.spec.target import CPU, TENSORRT

    _, manifest, files = _graphs_of(folder, preset)
    most = manifest.limits.images
    if images is not None and images > most:
        raise ConfigError("--images is beyond the bundle", expected=f"1 to {most}", got=images)
    limits = with_limits(manifest.limits, context, batch, images or min(4, most))
    runtime = CPU if on_cpu else TENSORRT
    return Model(manifest.config, files, manifest.limits.context, limits, runtime)
