"""`mmi train`: train a model folder further, on one's own documents or on data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.errors import ConfigError, EngineError
from mmi_deploy.hub.kinds import MODEL
from mmi_deploy.system.memory import is_out_of_memory
from mmi_deploy.system.output_folder import check_run_folder
from mmi_deploy.system.progress import Progress, shown, silent
from mmi_train.cli.choices import Device, Distil, Precision, Threads, Tracker, World
from mmi_train.training.recipes import (
    DEFAULTS,
    NO_GROUPS,
    Layer,
    assignments,
    default,
    written,
)
from mmi_train.training.recipes import recipe as read_recipe

_RECIPE, _DATA, _LEARNS, _MACHINE = "Recipe", "Documents", "What learns", "Machine"
_PLAN, _WATCH, _DISTIL = "Plan", "Watching", "Distillation"


def train(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Model folder to start from, or hf://org/name; it stays as it is.",
            show_default=False,
            file_okay=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Documents, one a line (.jsonl) or in a list (.json); a data set by its name, "
            "NAME:DIR; or the folder of a recipe's data sets, a folder for each.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for checkpoints, curves and the model.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="Settings from a recipe: a name or a .toml file; options overrule it.",
            metavar="NAME",
            rich_help_panel=_RECIPE,
        ),
    ] = DEFAULTS,
    distill: Annotated[
        Distil | None,
        typer.Option(
            help="Let the U-Net learn from its own frozen copy: guidance, in one branch; lcm and "
            "dmd, in a few steps. With the recipe of that name.",
            show_default=False,
            rich_help_panel=_DISTIL,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Guidance scale that is distilled; the model takes no other afterwards.",
            show_default="3.5, or the teacher's",
            metavar="X",
            rich_help_panel=_DISTIL,
        ),
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Model folder whose U-Net is distilled, of the same shape, or hf://org/name.",
            show_default="the model itself",
            file_okay=False,
            rich_help_panel=_DISTIL,
        ),
    ] = None,
    world: Annotated[
        World | None,
        typer.Option(
            help="Draw synthetic documents in place of --data: for models of that world.",
            show_default=False,
            rich_help_panel=_DISTIL,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the recipe, as lora.dropout=0.1; overrules all else.",
            show_default=False,
            metavar="KEY=VALUE",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    print_recipe: Annotated[
        bool,
        typer.Option(
            "--print-recipe",
            help="Print the settings with their sources as a recipe, and end.",
            rich_help_panel=_RECIPE,
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print the memory and the FLOPs that the run would take, and end.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    gpus: Annotated[
        int,
        typer.Option(
            min=1, help="Ranks among which weights are sharded.", metavar="N", rich_help_panel=_PLAN
        ),
    ] = 1,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of a rank: the largest batch that fits is printed too.",
            show_default=False,
            metavar="80GB",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Sustained TFLOP/s of a rank: the days of the run are printed too.",
            show_default=False,
            metavar="X",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    validate: Annotated[
        Path | None,
        typer.Option(
            help="Held-out documents, whose losses are measured meanwhile.",
            show_default=False,
            dir_okay=False,
            rich_help_panel=_WATCH,
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimiser steps between validations and samples.",
            show_default="as checkpoints",
            metavar="N",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            help="Documents whose last pictures are drawn into OUT/samples meanwhile.",
            show_default=False,
            dir_okay=False,
            rich_help_panel=_WATCH,
        ),
    ] = None,
    tracker: Annotated[
        Tracker | None,
        typer.Option(
            help="Another receiver of the curves beside TensorBoard.",
            show_default=False,
            rich_help_panel=_WATCH,
        ),
    ] = None,
    profile: Annotated[
        int,
        typer.Option(
            min=0,
            help="Optimiser steps of which all operators are traced.",
            metavar="STEPS",
            rich_help_panel=_WATCH,
        ),
    ] = 0,
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
        int | None,
        typer.Option(
            min=1,
            show_default=default("batch"),
            help="Documents in a micro-batch.",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=default("workers"),
            help="Processes that read and decode documents ahead.",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_bad: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=default("max_bad"),
            help="Documents that may be left out because they cannot be read.",
            metavar="N",
            rich_help_panel=_DATA,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Passes through the documents.",
            metavar="X",
            show_default=default("epochs"),
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps.", show_default="from --epochs", metavar="N"),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=default("accumulate"),
            help="Gradient accumulation: micro-batches per optimiser step, on each GPU.",
            metavar="N",
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1024,
            show_default=default("lora.rank"),
            help="Rank of the adapters (LoRA) of the language model and the U-Net; 0: none.",
            metavar="N",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    four_bit: Annotated[
        bool | None,
        typer.Option(
            "--four-bit/--no-four-bit",
            show_default=default("lora.four_bit"),
            help="Keep matrices that have adapters in 4 bits (QLoRA).",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Weights that learn themselves: published, table_11 to table_15 (the paper's), "
            "unet, image_decoder, all.",
            show_default="none, with adapters alone",
            metavar="NAME",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="Learning rate, after a warm-up and before a cosine decay to 0; groups need one.",
            show_default=default("rate"),
            metavar="X",
            rich_help_panel=_LEARNS,
        ),
    ] = None,
    image_weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=default("image_weight"),
            help="Weight of the pictures' loss beside that of the text.",
            metavar="X",
        ),
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99999,
            show_default=default("average"),
            help="Decay of a moving average (EMA) of the weights, which is what is written then.",
            metavar="X",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the order, the noise and new weights.",
            metavar="N",
            show_default=default("seed"),
        ),
    ] = None,
    device: Annotated[
        Device,
        typer.Option(help="auto: the GPU if PyTorch sees one.", rich_help_panel=_MACHINE),
    ] = "auto",
    precision: Annotated[
        Precision | None,
        typer.Option(
            show_default=default("precision"),
            help="Precision of the arithmetic; weights that learn are fp32.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    checkpoint_gradients: Annotated[
        bool | None,
        typer.Option(
            "--checkpoint-gradients/--no-checkpoint-gradients",
            show_default=default("checkpoint_gradients"),
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the blocks of the language model (torch.compile).",
            rich_help_panel=_MACHINE,
        ),
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=default("checkpoint_every"),
            help="Optimiser steps between checkpoints.",
            metavar="N",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a model folder further on documents of yours, or on the data sets of a recipe.

    It can be stopped at any time: the same command resumes from the last checkpoint and ends with
    the same weights. After every checkpoint OUT/model holds a usable model. On several GPUs:
    torchrun --nproc_per_node N -m mmi_deploy train ...
    """
    options = {
        "steps": steps,
        "epochs": epochs,
        "batch": batch,
        "accumulate": accumulate,
        "workers": workers,
        "max_bad": max_bad,
        "lora.rank": lora,
        "lora.four_bit": four_bit,
        "groups": groups,
        "rate": rate,
        "image_weight": image_weight,
        "average": average,
        "seed": seed,
        "precision": precision,
        "distill.guidance": guidance,
        "checkpoint_gradients": checkpoint_gradients,
        "checkpoint_every": checkpoint_every,
    }
    with extras("train"):
        import torch

        from mmi_train.cli.train_data import documents_of, print_mixture, size_remarks
        from mmi_train.cli.train_plan import print_plan
        from mmi_train.data.documents import Documents
        from mmi_train.data.readers.training import documents_at
        from mmi_train.data.synthetic import world as worlds
        from mmi_train.data.synthetic.world import WorldConfig
        from mmi_train.training.devices import device_called
        from mmi_train.training.fine_tuning import Watching, fine_tune
        from mmi_train.training.ranks import joined_ranks
        from mmi_train.training.settings import settings_of
    layers = [read_recipe(recipe)]
    if distill is not None:
        layers.append(read_recipe(f"distill_{distill}"))
        if lora and groups is None:
            options["groups"] = NO_GROUPS  # adapters of the U-Net in place of all its weights
    elif not guidance is world is teacher is None:
        raise ConfigError(
            "--guidance, --teacher and --world are of a distillation", fix="add --distill"
        )
    asked, values = settings_of(
        *layers,
        Layer("options", {key: value for key, value in options.items() if value is not None}),
        assignments(settings or []),
    )
    if print_recipe:
        results().out(written(values), end="")
        return
    if plan and model is not None and data is not None:
        folder = local_folder(model, MODEL)
        teacher = None if teacher is None else local_folder(teacher, MODEL)
        planned = documents_of(data, images, asked)
        print_plan(folder, planned, asked, gpus, memory, tflops, teacher)
        return
    if model is None or (data is None) == (world is None) or out is None:
        raise ConfigError(
            "a run needs a model, documents and a folder for its results",
            expected="mmi train MODEL --data FILE --out FOLDER; --plan needs no folder, and a "
            "distillation may have --world in place of --data",
        )
    if distill is not None and (validate or sample):
        raise ConfigError(
            "--validate and --sample are of a training on documents", fix="leave them out"
        )
    check_run_folder(out)
    named = spelled(model)
    model = local_folder(model, MODEL)
    teacher = None if teacher is None else local_folder(teacher, MODEL)
    remark = remarks()
    # torchrun numbers the processes: the first one speaks for all.
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as stack:
        progress: Progress = silent
        if first:
            progress = stack.enter_context(shown(remark, f"training {named} into {out}"))
        if threads is not None:
            torch.set_num_threads(threads)
        ranks = stack.enter_context(joined_ranks(device))
        place = device_called(device)
        documents: Documents | WorldConfig
        if data is not None:
            progress(f"reading {data}")
            documents = documents_of(data, images, asked)
            asked_steps = asked.steps_for(len(documents), ranks.size)
            if first:
                print_mixture(remark, documents, asked)
        else:
            documents = getattr(worlds, str(world))()
            asked_steps = asked.steps_for(0)
        if first:
            for line in size_remarks(model, asked):
                remark.print(line)
        watching = Watching(
            None if validate is None else documents_at(validate, images),
            None if sample is None else documents_at(sample, images),
            validate_every or asked.checkpoint_every,
            tracker,
            profile,
        )
        stack.enter_context(_memory())
        trained = fine_tune(
            model,
            documents,
            out,
            asked_steps,
            asked.tuning(),
            asked.run(),
            place,
            progress=progress,
            on_broken=remark.print,
            ranks=ranks,
            watching=watching,
            compiled=compiled,
            teacher=teacher,
        )
    if first:
        results().print(f"{trained}: export it with `mmi export {trained}`")


@contextmanager
def _memory() -> Iterator[None]:
    """Say what takes less memory where a run finds none."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(
            "there is not enough memory for this run",
            fix="give --checkpoint-gradients, or a smaller --batch with more --accumulate, or let "
            "adapters alone learn, with --four-bit",
        ) from None
