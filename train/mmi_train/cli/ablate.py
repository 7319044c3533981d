"""`mmi ablate`: train and table the paper's ablations on the drawn world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.hub.kinds import MODEL
from mmi_deploy.system.output_folder import check_run_folder
from mmi_deploy.system.progress import shown
from mmi_train.cli.choices import Precision, Threads


def ablate(
    studies: Annotated[
        list[str] | None,
        typer.Argument(help="Studies to run.", show_default="all", metavar="STUDY"),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for runs, tables and pictures.")
    ] = Path("runs/ablations"),
    start: Annotated[
        Path,
        typer.Option(
            help="Model folder, trained on the drawn world, that all runs start from, or "
            "hf://org/name."
        ),
    ] = Path("assets/tiny"),
    seeds: Annotated[int, typer.Option(min=1, max=8, help="Seeds of each row.", metavar="N")] = 3,
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps of each run.", metavar="N")
    ] = 1000,
    questions: Annotated[
        int, typer.Option(min=1, help="Held-out questions of each kind.", metavar="N")
    ] = 96,
    share: Annotated[
        float,
        typer.Option(
            min=0.01, max=8, help="Documents of a step, of those of the study.", metavar="X"
        ),
    ] = 1.0,
    keep_mmfs: Annotated[
        bool,
        typer.Option(
            "--keep-mmfs",
            help="Start with the layers of MMFS that the model has, for short runs.",
        ),
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="Precision of the arithmetic; weights are fp32.")
    ] = "fp32",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train and table the paper's ablations on the drawn world.

    Each row of a table is trained from the same model with every seed, and measured on held-out
    scenes; OUT gets results.md, results.json and contact sheets. It can be stopped at any time:
    the same command does what is missing. Studies: mmfs, tokens, resolution, attention, losses,
    resampler and images, from the paper; diffusion, of the options of that name.
    """
    check_run_folder(out)
    start = local_folder(start, MODEL)
    with shown(remarks(), f"ablations into {out}") as progress:
        with extras("ablate"):
            import torch

            from mmi_train.ablation.ablate import MARKDOWN
            from mmi_train.ablation.ablate import ablate as run
            from mmi_train.ablation.run import Scale
            from mmi_train.ablation.studies import STUDIES, study_called
        chosen = [study_called(name) for name in dict.fromkeys(studies or STUDIES)]
        if threads is not None:
            torch.set_num_threads(threads)
        scale = Scale(steps, questions, share=share, new_mmfs=not keep_mmfs, precision=precision)
        report = run(chosen, range(seeds), scale, start, out, progress)
    if as_json:
        print_json(report)
        return
    results().out((out / MARKDOWN).read_text(), end="")
