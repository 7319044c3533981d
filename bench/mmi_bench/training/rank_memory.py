"""Measure the memory that two ranks on the CPU take to load a model which they fine-tune.

    python -m mmi_bench.training.rank_memory [--layers N] [--groups NAME]

Random weights of a language model of 2048 channels. Growth of each process at most, beside that of
reading the whole model first and sharding it then.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import nn

from mmi_bench.training.adapter_memory import forget_peak, wide
from mmi_deploy.cli import program
from mmi_deploy.errors import MmiError
from mmi_deploy.system.process_memory import memory_bytes, peak_bytes
from mmi_export.placeholder_model import write_placeholder_model
from mmi_train.training.fine_tuning import FineTuning
from mmi_train.training.loading import load_for_training
from mmi_train.training.lora import LoraConfig, add_adapters
from mmi_train.training.optimiser import OptimiserConfig, frozen_matrices, parameter_groups
from mmi_train.training.ranks import Ranks, joined_ranks, local
from mmi_train.weights.model_folder import load_model

RANKS = 2
CPU = torch.device("cpu")


def rank_memory(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 4,
    groups: Annotated[str | None, typer.Option(help="Weights that learn; none: LoRA.")] = None,
) -> int:
    """Measure what each of two ranks takes at most while it loads."""
    lora = LoraConfig(layers=("llm",)) if groups is None else None
    tuning = FineTuning(batch=1, lora=lora, groups=groups, checkpoint_gradients=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        start = folder / "model"
        write_placeholder_model(wide(layers), start, "random", torch.bfloat16)
        for told, load in (("the whole model first", _whole), ("each rank its rows", _rows)):
            job = partial(_loading, start=start, tuning=tuning, load=load)
            for rank, one in enumerate(_forked(job, folder, load.__name__)):
                typer.echo(
                    f"loading, {told}, rank {rank}: {one['grown'] / 1e6:.0f} MB at most, "
                    f"{one['held'] / 1e6:.0f} MB of weights"
                )
    return 0


def _rows(start: Path, tuning: FineTuning, rules: OptimiserConfig, ranks: Ranks) -> nn.Module:
    return load_for_training(start, rules, "bf16", CPU, lora=tuning.lora, ranks=ranks)


def _whole(start: Path, tuning: FineTuning, rules: OptimiserConfig, ranks: Ranks) -> nn.Module:
    model = load_model(start, matrices=frozen_matrices(rules.rules))
    if tuning.lora is not None:
        add_adapters(model, tuning.lora)
    parameter_groups(model, rules)
    ranks.shard(model)
    return model


def _loading(
    ranks: Ranks,
    start: Path,
    tuning: FineTuning,
    load: Callable[[Path, FineTuning, OptimiserConfig, Ranks], nn.Module],
) -> dict[str, int]:
    gc.collect()
    forget_peak()
    before = memory_bytes()
    model = load(start, tuning, tuning.optimiser(1), ranks)
    return {"grown": peak_bytes() - before, "held": _bytes(model)}


def _bytes(model: nn.Module) -> int:
    own = {local(value) for value in (*model.parameters(), *model.buffers())}
    return sum(value.numel() * value.dtype.itemsize for value in own)


def _forked(
    job: Callable[[Ranks], dict[str, int]], folder: Path, name: str
) -> list[dict[str, int]]:
    """Run `job` in forked ranks; returns the findings of each."""
    children = []
    for rank in range(RANKS):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            torch.set_num_threads(1)
            with joined_ranks("cpu", f"file://{folder / name}.meeting") as ranks:
                (folder / f"{name}-{rank}").write_text(json.dumps(job(ranks)))
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise MmiError(f"a rank has ended while it measured: {name}")
    return [json.loads((folder / f"{name}-{rank}").read_text()) for rank in range(RANKS)]


run = program.program("rank-memory", rank_memory)

if __name__ == "__main__":
    program.main(run)
