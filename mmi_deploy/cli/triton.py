"""`mmi triton`: write a model for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, print_json, results
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.cli.target_options import MACHINE, Device, Kernels, TargetName
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.spec.backends import AUTO, CPU


def triton(
    repository: Annotated[
        Path,
        typer.Argument(help="Model repository; models in it stay.", show_default=False),
    ],
    bundle: Annotated[
        Path, typer.Argument(help="Bundle of `mmi export`, or hf://org/name.")
    ] = Path("bundles/tiny"),
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the model, and of its folder.")
    ] = "mmi",
    server_bundle: Annotated[
        str | None,
        typer.Option(
            "--server-bundle",
            metavar="PATH",
            help="Path of the bundle on the server's machine, such as a mount of a container.",
            show_default="where it is here",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    target: TargetName = CPU,
    device: Device = 0,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Documents at once.",
            metavar="N",
            show_default="as many as the memory holds",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_THREADS,
            help="CPU threads; 0: one per core.",
            metavar="N",
            rich_help_panel=MACHINE,
        ),
    ] = 0,
    kernels: Kernels = AUTO,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an output folder that mmi wrote for another purpose."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model for Triton Inference Server: a decoupled model of its Python backend.

    Its requests share the runs of one batch engine. The server's Python must have mmi_deploy.
    """
    from mmi_deploy.bundle.bundle import Bundle
    from mmi_deploy.runtime.backend import check_target
    from mmi_deploy.server.triton.repository import write_model
    from mmi_deploy.server.triton.settings import ModelSettings

    folder = local_folder(bundle, BUNDLE, targets=[target])
    opened = Bundle.open(folder)
    check_target(opened, target)
    path = server_bundle or str(folder.resolve())
    settings = ModelSettings(path, target, slots, kernels, threads)
    model = write_model(repository, name, settings, device=device, force=force, inputs=(folder,))
    if as_json:
        print_json({"model": str(model), "parameters": settings.parameters()})
    else:
        results().print(f"{model}: tritonserver --model-repository {repository}")
