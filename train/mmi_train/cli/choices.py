"""Choices and options that commands of training share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mmi_deploy.cli.console import MOST_THREADS

World = Literal["easy", "medium", "hard"]
Precision = Literal["bf16", "fp32"]
Device = Literal["auto", "cpu", "cuda"]
Distil = Literal["guidance", "lcm", "dmd"]
Tracker = Literal["wandb", "trackio"]

Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="CPU threads.",
        show_default="PyTorch's choice",
        metavar="N",
        rich_help_panel="Machine",
    ),
]
