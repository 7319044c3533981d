"""`mmi delta make`: the weights in which a model differs from its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import counted, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import existing_folder, spelled
from mmi_deploy.hub.kinds import MODEL
from mmi_deploy.system.files import size
from mmi_deploy.system.output_folder import check_replaceable, new_folder
from mmi_deploy.system.progress import shown


def make(
    base: Annotated[
        Path,
        typer.Argument(help="Model folder that the training started from.", metavar="BASE"),
    ],
    model: Annotated[Path, typer.Argument(help="Model folder that it wrote.", metavar="MODEL")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the delta.", metavar="DIR")],
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Keep matrices and convolutions as differences in 8 bits: half the size of fp16, "
            "but the model is rounded. Evaluate it after `mmi delta apply`.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that mmi wrote, of another kind too.")
    ] = False,
) -> None:
    """Write the weights in which a model differs from its base: a distilled U-Net, say.

    The two must differ in values alone. BASE and MODEL may be hf://org/name.
    """
    check_replaceable(out, force, kind="delta")
    named = spelled(base)
    base, model = existing_folder(base, MODEL), existing_folder(model, MODEL)
    check_replaceable(out, force, kind="delta", inputs=[base, model])
    with shown(remarks(), f"comparing with {named}") as progress:
        with extras("delta"):
            from mmi_train.weights.delta import DELTA_KIND, make_delta
        made = make_delta(base, model, progress, int8=int8)
        with new_folder(out, force, kind=DELTA_KIND) as work:
            made.save(work)
    changed = len(made.weights) + len(made.differences)
    whole = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    results().print(
        f"{out}: {counted(changed, 'weight')}, {size(whole)}; "
        f"put them on their base with `mmi delta apply {named} {out} -o MODEL`",
        markup=False,
    )
