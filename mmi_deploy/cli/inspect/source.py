"""Shared arguments of the views of `mmi inspect`, and the graphs that they select."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import GRAPHS

if TYPE_CHECKING:
    from mmi_deploy.analysis.memory_estimate import Model
    from mmi_deploy.bundle.manifest import BundleManifest

_BUNDLE = "Folder of a bundle, or hf://org/name."

Folder = Annotated[Path | None, typer.Argument(help=_BUNDLE, show_default=False)]
BundleFolder = Annotated[Path, typer.Argument(help=_BUNDLE, show_default=False)]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Use the bundle of this preset in bundles/PRESET instead.", show_default=False
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(help="Only this recipe: fp32, fp16, int8 ...", show_default="all"),
]
Gpus = Annotated[
    list[str] | None,
    typer.Option("--gpu", help="GPU, such as l4; may be repeated.", show_default=False),
]
Context = Annotated[
    int | None, typer.Option(help="Tokens per document.", show_default="the bundle's")
]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Batch size: documents at a time.")]
Images = Annotated[int | None, typer.Option(min=1, help="Images per document.", show_default="4")]
OnCpu = Annotated[bool, typer.Option("--cpu", help="Estimate for the CPU instead of a GPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Graphs:
    """Graph files of a bundle. Files are not hashed and weights not read, so that a bundle of a
    hundred gigabytes is inspected in seconds."""

    name: str
    manifest: BundleManifest
    files: dict[str, Path]


def graphs_of(folder: Path | None, preset: str | None) -> Graphs:
    """Graphs of a bundle, or of `bundles/PRESET`. Raises `ConfigError` where there are none."""
    from mmi_deploy.bundle.bundle import EXPORT, MANIFEST
    from mmi_deploy.bundle.manifest import BundleManifest, read_manifest
    from mmi_deploy.spec.presets import preset as preset_called

    if folder and preset:
        raise ConfigError("a folder and --preset were given", expected="one of them")
    if folder is None and preset:
        preset_called(preset)
        folder = Path("bundles") / preset
        if not (folder / MANIFEST).exists():
            raise ConfigError(
                f"there are no graphs of preset {preset} in {folder}",
                fix=f"export them without weights: `{EXPORT} --preset {preset} --sparse-weights "
                f"-o {folder}`",
            )
    if folder is None:
        raise ConfigError("no graphs were given", expected="the folder of a bundle, or --preset")
    local = local_folder(folder, GRAPHS)
    manifest = read_manifest(local / MANIFEST, BundleManifest, EXPORT)
    files = {name: local / path for name, path in manifest.graphs.items()}
    return Graphs(spelled(folder), manifest, files)


def memory_model(
    graphs: Graphs, context: int | None, batch: int, images: int | None, on_cpu: bool
) -> Model:
    """Memory model of graphs and the documents that run at a time. Raises `ConfigError` for limits
    beyond the bundle's."""
    from mmi_deploy.analysis.memory_estimate import Model, with_limits
    from mmi_deploy.spec.backends import CPU, TENSORRT

    limits = graphs.manifest.limits
    most = limits.images
    if images is not None and images > most:
        raise ConfigError("--images is beyond the bundle", expected=f"1 to {most}", got=images)
    wanted = with_limits(limits, context, batch, images or min(4, most))
    runtime = CPU if on_cpu else TENSORRT
    return Model(graphs.manifest.config, graphs.files, limits.context, wanted, runtime)
