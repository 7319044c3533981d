"""Measure the memory of two ranks that fine-tune on the CPU: at loading, in steps, at a checkpoint.

    python -m mmi_bench.training.rank_memory [--layers N] [--groups NAME]

Random weights of a language model of 2048 channels; two steps on one short document and a
checkpoint. Loading: growth of the process at most, beside that of reading the whole model first and
sharding it then. Steps: the most that PyTorch's allocator hands out, beside the plan.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmi_bench.training.adapter_memory import forget_peak, wide
from mmi_deploy.cli import program
from mmi_deploy.documents.tokenizer import Tokenizer
from mmi_deploy.errors import MmiError
from mmi_deploy.system.process_memory import memory_bytes, peak_bytes
from mmi_deploy.system.progress import silent
from mmi_export.placeholder_model import write_placeholder_model
from mmi_train.data.document_file import DocumentFile
from mmi_train.training.fine_tuning import FineTuning
from mmi_train.training.loading import load_for_training
from mmi_train.training.loop import RunConfig, train
from mmi_train.training.lora import LoraConfig, add_adapters
from mmi_train.training.memory_plan import MemoryPlan, memory_plan
from mmi_train.training.optimiser import OptimiserConfig, frozen_matrices, parameter_groups
from mmi_train.training.ranks import Ranks, joined_ranks, local
from mmi_train.training.stages.documents import DocumentsStage
from mmi_train.weights.model_folder import TOKENIZER, load_model

RANKS, STEPS = 2, 2
CPU = torch.device("cpu")


def rank_memory(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 4,
    groups: Annotated[str | None, typer.Option(help="Weights that learn; none: LoRA.")] = None,
) -> int:
    """Measure what each of two ranks holds, beside the plan."""
    lora = LoraConfig(layers=("llm",)) if groups is None else None
    tuning = FineTuning(batch=1, lora=lora, groups=groups, checkpoint_gradients=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        start = folder / "model"
        write_placeholder_model(wide(layers), start, "random", torch.bfloat16)
        (folder / "d.jsonl").write_text(
            json.dumps([{"text": " ".join(f"w{n}" for n in range(20, 100))}])
        )
        file = DocumentFile(folder / "d.jsonl")
        plan = memory_plan(start, file, tuning, ranks=RANKS, checkpointed=(True,), batches=(1,))
        jobs: dict[str, Callable[[Ranks], dict[str, int]]] = {
            "whole": lambda ranks: _loading(ranks, start, tuning, _whole),
            "rows": lambda ranks: _loading(ranks, start, tuning, _rows),
            "run": lambda ranks: _run(ranks, start, file, tuning, folder / "out"),
        }
        found = {name: _forked(job, folder, name) for name, job in jobs.items()}
    for name, told in (("whole", "the whole model first"), ("rows", "each rank its rows")):
        for rank, one in enumerate(found[name]):
            typer.echo(
                f"loading, {told}, rank {rank}: {one['grown'] / 1e6:.0f} MB at most, "
                f"{one['held'] / 1e6:.0f} MB of weights"
            )
    for rank, one in enumerate(found["run"]):
        _tell(plan, rank, one)
    return 0


def _tell(plan: MemoryPlan, rank: int, one: dict[str, int]) -> None:
    planned = plan.per_rank(1, True), plan.per_rank(1, True) + plan.checkpoint_copy
    for what, held, wanted in zip(("steps", "checkpoints"), ("steps", "all"), planned, strict=True):
        typer.echo(
            f"rank {rank}, most in {what}: {one[held] / 1e6:.0f} MB, planned {wanted / 1e6:.0f} MB "
            f"({wanted / one[held] - 1:+.1%})"
        )


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
    model = load(start, tuning, tuning.optimiser(STEPS), ranks)
    return {"grown": peak_bytes() - before, "held": _bytes(model)}


def _bytes(model: nn.Module) -> int:
    own = {local(value) for value in (*model.parameters(), *model.buffers())}
    return sum(value.numel() * value.dtype.itemsize for value in own)


def _run(
    ranks: Ranks, start: Path, file: DocumentFile, tuning: FineTuning, out: Path
) -> dict[str, int]:
    """Bytes that two steps hold at most without a checkpoint, and with one at each step."""
    found = {}
    for name, told in (("steps", _stop), ("all", silent)):
        optimiser = tuning.optimiser(STEPS)
        model = load_for_training(
            start,
            optimiser,
            "bf16",
            CPU,
            lora=tuning.lora,
            checkpoint_gradients=tuning.checkpoint_gradients,
            ranks=ranks,
        )
        tokenizer = Tokenizer.open(start / TOKENIZER, model.config.tokens)
        stage = DocumentsStage(model, tokenizer, file, tuning.batch)
        run = RunConfig(checkpoint_every=1 if told is silent else STEPS)
        gc.collect()
        weights = _bytes(model)
        with (
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
            suppress(_Enough),
        ):
            train(stage, optimiser, run, out / name, progress=told, frozen="random", ranks=ranks)
        events = seen.profiler.kineto_results.events()
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        found[name] = weights + max(accumulate(changes))
        del model, stage, seen, events
    return found


class _Enough(Exception):
    """The steps are done, and no checkpoint has begun."""


def _stop(what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: str = "") -> None:
    if done == STEPS:
        raise _Enough


def _forked(
    job: Callable[[Ranks], dict[str, int]], folder: Path, name: str
) -> list[dict[str, int]]:
    """What `job` finds in each of the forked ranks."""
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
