"""`mmi train-tiny`: train a tiny model from nothing, on drawn scenes or emoji."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmi_deploy.cli.console import remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import MODEL
from mmi_deploy.system.output_folder import check_run_folder
from mmi_deploy.system.progress import shown
from mmi_train.cli.choices import Precision, Threads, World
from mmi_train.training.recipes import assignments


def train_tiny(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, curves and the model.")
    ] = Path("runs/tiny"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Optimiser steps of the main stage, of all parts together.",
            show_default="the recipe's",
            metavar="N",
            rich_help_panel="Training",
        ),
    ] = None,
    conditioning_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Optimiser steps of the stage before it, without the U-Net.",
            show_default="the recipe's",
            metavar="N",
            rich_help_panel="Training",
        ),
    ] = None,
    autoencoder_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimiser steps of the first stage, the autoencoder's.",
            show_default="the recipe's",
            metavar="N",
            rich_help_panel="Training",
        ),
    ] = None,
    picture_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Optimiser steps of a last stage, which trains the image decoder alone.",
            metavar="N",
            rich_help_panel="Training",
        ),
    ] = 0,
    world: Annotated[
        World, typer.Option(help="Difficulty of the synthetic scenes.", rich_help_panel="Training")
    ] = "easy",
    emoji: Annotated[
        Path | None,
        typer.Option(
            help="Train on this emoji set, which `mmi data emoji` made, in place of scenes.",
            show_default="drawn scenes",
            metavar="DIR",
            rich_help_panel="Training",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Model folder whose weights are trained further, or hf://org/name.",
            show_default="new weights",
            rich_help_panel="Training",
        ),
    ] = None,
    new_autoencoder: Annotated[
        bool,
        typer.Option(
            "--new-autoencoder",
            help="Train a new autoencoder in place of that of --start.",
            rich_help_panel="Training",
        ),
    ] = False,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A field of the configuration, as image_decoder.diffusion.min_snr_gamma=5.",
            show_default=False,
            metavar="FIELD=VALUE",
            rich_help_panel="Training",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of weights and data.", metavar="N", rich_help_panel="Training"
        ),
    ] = 0,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Precision of the arithmetic; weights are fp32.", rich_help_panel="Machine"
        ),
    ] = "fp32",
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Gradient accumulation: micro-batches per optimiser step.",
            metavar="N",
            rich_help_panel="Training",
        ),
    ] = 1,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Pack documents into rows of the full context length, as in the paper.",
            rich_help_panel="Training",
        ),
    ] = False,
    checkpoint_gradients: Annotated[
        bool,
        typer.Option(
            "--checkpoint-gradients",
            help="Gradient checkpointing: less memory, more time.",
            rich_help_panel="Machine",
        ),
    ] = False,
    threads: Threads = None,
) -> None:
    """Train a tiny model in stages: the autoencoder; reading and conditioning; then everything.

    It learns from scenes that are drawn for it, or from emoji. `--picture-steps` adds a stage.

    It can be stopped at any time: the same command resumes from the last checkpoint and ends with
    the same weights. After every checkpoint OUT/model holds a usable model.
    """
    if packed and conditioning_steps is not None:
        raise ConfigError(
            "--packed has no conditioning stage", fix="leave --conditioning-steps out"
        )
    if emoji is not None and world != "easy":
        raise ConfigError("--world is of drawn scenes", got=f"--emoji {emoji} too", fix="omit one")
    if fields and start is not None:
        raise ConfigError("--set is of new models", got=f"the model {start} too", fix="omit one")
    if steps == 0 and (start is None or picture_steps == 0):
        raise ConfigError(
            "without the main stage there is nothing to train",
            expected="a trained model as --start, and --picture-steps",
        )
    if steps == 0 and conditioning_steps:
        raise ConfigError(
            "the conditioning stage is followed by the main stage",
            fix="leave --conditioning-steps out, or give more --steps",
        )
    if start is not None and autoencoder_steps is not None and not new_autoencoder:
        raise ConfigError("the autoencoder of --start is kept", fix="add --new-autoencoder")
    if new_autoencoder and start is None:
        raise ConfigError("--new-autoencoder is of --start", fix="new models train one anyway")

    check_run_folder(out)
    start = None if start is None else local_folder(start, MODEL)
    with shown(remarks(), f"training tiny into {out}") as progress:
        with extras("train-tiny"):
            import torch

            from mmi_deploy.spec.config import with_fields
            from mmi_deploy.spec.presets import emoji as emoji_preset
            from mmi_deploy.spec.presets import tiny
            from mmi_train.data.corpus import Corpus
            from mmi_train.data.emoji.documents import EmojiCorpus
            from mmi_train.data.emoji.emoji_set import read_set
            from mmi_train.data.synthetic import world as worlds
            from mmi_train.data.synthetic.drawn_world import DrawnWorld
            from mmi_train.training.from_scratch import StageSteps, train_from_scratch
            from mmi_train.training.loop import RunConfig
        if threads is not None:
            torch.set_num_threads(threads)
        config = tiny()
        corpus: Corpus = DrawnWorld(getattr(worlds, world)())
        if emoji is not None:
            corpus = EmojiCorpus(read_set(emoji))
            config = emoji_preset(corpus.tokenizer().get_vocab_size())
        model = train_from_scratch(
            with_fields(config, assignments(fields or []).values),
            out,
            corpus=corpus,
            steps=StageSteps(autoencoder_steps, conditioning_steps, steps, picture_steps),
            seed=seed,
            run=RunConfig(precision=precision, accumulate=accumulate),
            start=start,
            new_autoencoder=new_autoencoder,
            packed=packed,
            checkpoint_gradients=checkpoint_gradients,
            progress=progress,
        )
    results().print(f"{model}: export it with `mmi export {model}`")
