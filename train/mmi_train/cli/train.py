"""`mmi train`: train a model folder further, on one's own documents."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import MOST_THREADS, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.system.output_folder import check_run_folder
from mmi_deploy.system.progress import Progress, shown, silent
from mmi_train.cli.choices import Device, Precision

_DATA, _LEARNS, _MACHINE = "Documents", "What learns", "Machine"


def train(
    model: Annotated[
        Path,
        typer.Argument(help="Model folder to start from; it stays as it is.", file_okay=False),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Documents, one a line (.jsonl) or in a list (.json).",
            dir_okay=False,
            rich_help_panel=_DATA,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, curves and the model.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the pictures that the documents name.",
            show_default="that of the documents",
            file_okay=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(min=1, help="Documents in a micro-batch.", metavar="N", rich_help_panel=_DATA),
    ] = 4,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes that read and decode documents ahead.",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = 0,
    max_bad: Annotated[
        int,
        typer.Option(
            min=0,
            help="Documents that may be left out because they cannot be read.",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = 100,
    epochs: Annotated[
        float, typer.Option(min=0.001, help="Passes through the documents.", metavar="X")
    ] = 3.0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps.", show_default="from --epochs", metavar="N"),
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Gradient accumulation: micro-batches per optimiser step, on each GPU.",
            metavar="N",
        ),
    ] = 1,
    lora: Annotated[
        int,
        typer.Option(
            min=0,
            max=1024,
            help="Rank of the adapters (LoRA) of the language model and the U-Net; 0: none.",
            metavar="N",
            rich_help_panel=_LEARNS,
        ),
    ] = 16,
    four_bit: Annotated[
        bool,
        typer.Option(
            "--four-bit",
            help="Keep matrices that have adapters in 4 bits (QLoRA).",
            rich_help_panel=_LEARNS,
        ),
    ] = False,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Weights that learn themselves: published, table_11 to table_15 (the paper's), "
            "all.",
            show_default="none, with adapters alone",
            metavar="NAME",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="Learning rate, after a warm-up and before a cosine decay to 0.",
            show_default="1e-4, or that of the groups",
            metavar="X",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    image_weight: Annotated[
        float,
        typer.Option(
            min=0, help="Weight of the pictures' loss beside that of the text.", metavar="X"
        ),
    ] = 10.0,
    average: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.99999,
            help="Decay of a moving average (EMA) of the weights, which is what is written then.",
            metavar="X",
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the order, the noise and new weights.", metavar="N")
    ] = 0,
    device: Annotated[
        Device,
        typer.Option(help="auto: the GPU if PyTorch sees one.", rich_help_panel=_MACHINE),
    ] = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Precision of the arithmetic; weights that learn are fp32.",
            rich_help_panel=_MACHINE,
        ),
    ] = "bf16",
    checkpoint_gradients: Annotated[
        bool,
        typer.Option(
            "--checkpoint-gradients",
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Optimiser steps between checkpoints.",
            metavar="N",
            rich_help_panel=_MACHINE,
        ),
    ] = 250,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_THREADS,
            help="CPU threads.",
            show_default="PyTorch's choice",
            metavar="N",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
) -> None:
    """Train a model folder further on documents of yours.

    It can be stopped at any time: the same command resumes from the last checkpoint and ends with
    the same weights. After every checkpoint OUT/model holds a usable model. On several GPUs:
    torchrun --nproc_per_node N -m mmi_deploy train ...
    """
    check_run_folder(out)
    remark = remarks()
    # torchrun numbers the processes: the first one speaks for all.
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        progress: Progress = silent
        if first:
            progress = stack.enter_context(shown(remark, f"training {model} into {out}"))
        with extras("train"):
            import torch

            from mmi_train.data.document_file import DocumentFile
            from mmi_train.training.devices import device_called
            from mmi_train.training.fine_tuning import FineTuning, fine_tune, steps_of
            from mmi_train.training.loop import RunConfig
            from mmi_train.training.lora import LoraConfig
            from mmi_train.training.ranks import joined_ranks
        if threads is not None:
            torch.set_num_threads(threads)
        ranks = stack.enter_context(joined_ranks(device))
        place = device_called(device)
        progress(f"reading {data}")
        documents = DocumentFile(data, images)
        trained = fine_tune(
            model,
            documents,
            out,
            steps or steps_of(epochs, len(documents), batch * accumulate * ranks.size),
            FineTuning(
                groups=groups,
                lora=LoraConfig(rank=lora, alpha=2 * lora, four_bit=four_bit) if lora else None,
                rate=rate,
                batch=batch,
                image_weight=image_weight,
                max_bad=max_bad,
                checkpoint_gradients=checkpoint_gradients,
            ),
            RunConfig(
                seed=seed,
                precision=precision,
                accumulate=accumulate,
                average=average,
                checkpoint_every=checkpoint_every,
                workers=workers,
            ),
            place,
            progress=progress,
            on_broken=remark.print,
            ranks=ranks,
        )
    if first:
        results().print(f"{trained}: export it with `mmi export {trained}`")
