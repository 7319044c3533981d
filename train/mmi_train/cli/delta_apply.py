"""`mmi delta apply`: a model from its base and a delta, or LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import counted, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import existing_folder, spelled
from mmi_deploy.hub.kinds import DELTA, MODEL
from mmi_deploy.system.output_folder import check_replaceable, new_folder
from mmi_deploy.system.progress import shown


def apply(
    base: Annotated[
        Path,
        typer.Argument(help="Model folder that the training started from.", metavar="BASE"),
    ],
    delta: Annotated[
        Path,
        typer.Argument(
            help="What `mmi delta make` wrote, or the folder `adapters` of `mmi train`.",
            metavar="DELTA",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model.", metavar="DIR")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that mmi wrote, of another kind too.")
    ] = False,
) -> None:
    """Write the model that a base and a delta are together.

    Adapters are merged: W + scale * B A in fp32, rounded once to the type of W in the base. BASE
    and DELTA may be hf://org/name.
    """
    check_replaceable(out, force, kind="model")
    named = f"{spelled(delta)} on {spelled(base)}"
    base, delta = existing_folder(base, MODEL), existing_folder(delta, DELTA)
    check_replaceable(out, force, kind="model", inputs=[base, delta])
    with shown(remarks(), f"putting {named}") as progress:
        with extras("delta"):
            from mmi_train.training.merging import merge
            from mmi_train.weights.model_folder import FOLDER_KIND
        with new_folder(out, force, kind=FOLDER_KIND) as work:
            changed = merge(base, delta, work, progress)
    results().print(
        f"{out}: {counted(changed, 'weight')} changed; export it with `mmi export {out}`",
        markup=False,
    )
