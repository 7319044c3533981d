"""Measure how fast a recipe's data is read, beside how fast the model takes it, on one core.

    python -m mmi_bench.training.reading MODEL ROOT [--recipe pretrain]

Reading: samples, decoding, tokens, packing, both sizes of each picture, the batch with its layout.
The model: a forward and a backward pass of the same micro-batches in fp32. Times are CPU time, so
that other processes on the machine change them little.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mmi_deploy.cli import program
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_train.data.mixture import mixture_of
from mmi_train.data.readers.mixture import open_mixture
from mmi_train.training.fine_tuning import stage_class
from mmi_train.training.recipes import assignments, recipe
from mmi_train.training.settings import settings_of
from mmi_train.weights.model_folder import TOKENIZER, load_model


def reading(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    root: Annotated[Path, typer.Argument(help="Folder of the recipe's data sets.")],
    name: Annotated[str, typer.Option("--recipe", help="Recipe.")] = "pretrain",
    chosen: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the recipe.", metavar="KEY=VALUE")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Micro-batches to read.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Micro-batches to compute.")] = 2,
) -> int:
    """Measure pictures a second of reading, and of the model on what was read, on one core."""
    torch.set_num_threads(1)
    asked, _ = settings_of(recipe(name), assignments(chosen or []))
    documents = mixture_of(open_mixture(root, asked.data, rows=asked.batch, seed=asked.seed))
    trained = load_model(model).train()
    tokenizer = Tokenizer.open(model / TOKENIZER, trained.config.tokens)
    stage = stage_class(asked.tuning(), documents)(trained, tokenizer, documents, asked.batch)
    stage.describe()  # finds strides of packed rows
    begun, made = time.process_time(), []
    for index in range(batches):
        made.append(stage.batch(index, np.random.default_rng(index)))
    read = sum(len(one.batch.pixels) for one in made if one.batch.pixels is not None)
    read_rate = read / (time.process_time() - begun)
    taken, begun = 0, time.process_time()
    for one in made[:steps]:
        stage.losses(one)["total"].backward()
        taken += 0 if one.batch.pixels is None else len(one.batch.pixels)
    model_rate = taken / (time.process_time() - begun)
    typer.echo(
        f"read {read_rate:.1f} pictures/s, taken by the model {model_rate:.2f} pictures/s: "
        f"{read_rate / model_rate:.0f} times"
    )
    return 0


run = program.program("reading", reading)

if __name__ == "__main__":
    program.main(run)
