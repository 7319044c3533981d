"""`make paper-small`: the whole paper in small, on data sets drawn here in the published formats.

Trees of data; pre-training by the recipe `pretrain`; from its model each fine-tuning by its recipe;
the benchmarks answered by every model, through PyTorch or, with `--deployed`, by its exported
graphs. The same command goes on where it was stopped, and a stage that is done is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from mmi_bench.paper_small.base_model import write_base_model
from mmi_bench.paper_small.commands import Done, Stages, settings
from mmi_bench.paper_small.drawn import PREDICTIONS, scenes_right, write_maps
from mmi_deploy.cli import program
from mmi_deploy.cli.console import print_table, results
from mmi_deploy.system.output_folder import new_folder
from mmi_train.data.synthetic.published_trees import NAMES, Sizes, write_tree
from mmi_train.data.synthetic.world import easy
from mmi_train.training.recipes import recipe as recipe_called

PRETRAIN = "pretrain"

# Benchmarks of the model of each recipe; the pre-trained model answers all of them too.
BENCHMARKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        PRETRAIN: ("coco-t2i",),
        "vqa_captions": ("coco-caption", "vqav2"),
        "grounding": ("refcoco", "refcoco+", "refcocog"),
        "segmentation": ("ade20k",),
        "stories": ("vist",),
    }
)

# Benchmarks whose answers are pictures.
DRAWN = ("ade20k", "vist", "coco-t2i")

# Metric of each benchmark in the table: the first that was measured.
METRICS = ("CIDEr", "CIDEr, python tokens", "accuracy", "IoU@0.5", "mIoU", "whole scenes")


@dataclass(frozen=True)
class Scale:
    """Size of a run: optimiser steps of each training, micro-batch in documents (of pre-training,
    rows), samples of the trees, learning rate. `deployed`: exported graphs answer."""

    steps: int
    batch: int
    rows: int
    sizes: Sizes
    rate: float
    deployed: bool = False


class SmallPaper:
    """A run in the folder `out`."""

    def __init__(self, start: Path, out: Path, scale: Scale, seed: int) -> None:
        self.out, self.scale, self.seed = out, scale, seed
        self.data, self.base = out / "data", out / "base"
        self.stages = Stages(out)
        self._start = start

    def prepare(self) -> None:
        """Write the trees and the model to start from, unless they are there."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.data.is_dir():
            with new_folder(self.data, None, kind="drawn data sets") as work:
                for name in NAMES:
                    write_tree(work / name, name, easy(), self.scale.sizes, self.seed)
        if not self.base.is_dir():
            write_base_model(self._start, self.base, self.seed)

    def train(self, name: str) -> Path:
        """Train by a recipe; returns the model folder, or the bundle of its graphs."""
        scale, model = self.scale, self.base
        wanted: dict[str, object] = {"warmup": max(scale.steps // 10, 1)}
        sets = {key.split(".")[1] for key in recipe_called(name).values if key.startswith("data.")}
        wanted |= {f"data.{one}.weight": 0 for one in sorted(sets - set(NAMES))}
        batch = scale.batch
        if name == PRETRAIN:
            batch = scale.rows
            wanted["data.mmc4.rows"] = 2 * scale.rows
        else:
            model = self.out / PRETRAIN / "model"
        self.stages.mmi(
            f"train {name}",
            *("train", model, "--recipe", name, "--data", self.data, "-o", self.out / name),
            *("--steps", str(scale.steps), "--batch", str(batch), "--accumulate", "1"),
            *("--groups", "all", "--rate", str(scale.rate), "--seed", str(self.seed)),
            *("--precision", "fp32", "--no-checkpoint-gradients"),
            *settings(wanted),
        )
        trained = self.out / name / "model"
        if not scale.deployed:
            return trained
        bundle = self.out / "bundles" / name
        self.stages.mmi(f"export {name}", "export", trained, "-o", bundle)
        return bundle

    def measure(self, name: str, model: Path, benchmark: str) -> Done:
        """Answer a benchmark with the model of a recipe, and score the answers."""
        data, stage = self.data / benchmark, f"{benchmark} by {name}"
        answers = self.out / "answers" / name / f"{benchmark}.jsonl"
        answers.parent.mkdir(parents=True, exist_ok=True)
        asked = ("evaluate", model, "--benchmark", benchmark, "--data", data, "-o", answers)
        if benchmark not in DRAWN:
            return self.stages.mmi(stage, *asked, "--json", prints_json=True)
        self.stages.mmi(f"pictures of {stage}", *asked, "--json")
        if benchmark == "ade20k":
            maps = answers.with_name("maps")
            if not maps.is_dir():
                write_maps(answers, maps, easy())
            scored = ("evaluate", "--predictions", maps / PREDICTIONS, "--benchmark", benchmark)
            return self.stages.mmi(stage, *scored, "--data", data, "--json", prints_json=True)
        found = self.stages.done.get(stage)
        metrics = found.metrics if found else scenes_right(answers, benchmark, data, easy())
        return self.stages.note(stage, "scenes read by template matching", metrics)

    def table(self) -> Table:
        """A row for each benchmark: before and after its fine-tuning, with the seconds of both."""
        table = Table(
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            title=f"{self.scale.steps} steps each, seed {self.seed}, {self.scale.sizes.held_out} "
            "held-out samples of each set; seconds: on the clock (of the processors)",
            title_justify="left",
        )
        headings = ("recipe", "training", "benchmark", "metric", "pre-trained", "fine-tuned")
        for heading in headings:
            table.add_column(heading, no_wrap=True)
        done = self.stages.done
        for name, benchmarks in BENCHMARKS.items():
            trained = _seconds(done[f"train {name}"])
            for number, benchmark in enumerate(benchmarks):
                before = done[f"{benchmark} by {PRETRAIN}"].metrics
                after = done[f"{benchmark} by {name}"].metrics
                metric = next((one for one in METRICS if one in after), next(iter(after)))
                fine = "" if name == PRETRAIN else f"{after[metric]:.1f}"
                first = ("", "") if number else (name, trained)
                table.add_row(*first, benchmark, metric, f"{before[metric]:.1f}", fine)
        whole = (sum(values) for values in zip(*map(_times, done.values()), strict=True))
        table.caption = "all stages: {:.0f} ({:.0f}) seconds".format(*whole)
        table.caption_justify = "left"
        return table


def _times(one: Done) -> tuple[float, float]:
    return one.seconds, one.processor_seconds


def _seconds(one: Done) -> str:
    return f"{one.seconds:.0f} ({one.processor_seconds:.0f})"


def paper_small(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run; the same command goes on in it.")
    ] = Path("runs/paper-small"),
    steps: Annotated[
        int, typer.Option(min=1, help="Optimiser steps of each training.", metavar="N")
    ] = 100,
    batch: Annotated[
        int, typer.Option(min=1, help="Documents of a micro-batch in fine-tuning.", metavar="N")
    ] = 4,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows of a micro-batch in pre-training.", metavar="N")
    ] = 1,
    samples: Annotated[
        int, typer.Option(min=5, help="Samples of each training split.", metavar="N")
    ] = 512,
    held_out: Annotated[
        int, typer.Option(min=1, help="Samples of each held-out split.", metavar="N")
    ] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate of all trainings.")] = 5e-4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and trainings.", metavar="N")] = 0,
    start: Annotated[
        Path, typer.Option(help="Model to start from: one of the drawn world.", metavar="MODEL")
    ] = Path("assets/tiny"),
    deployed: Annotated[
        bool,
        typer.Option("--deployed", help="Export every model, and let its graphs answer."),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads.", show_default="all cores", metavar="N"),
    ] = None,
) -> int:
    """Run the paper in small: trees of data, pre-training, fine-tunings, benchmarks, one table."""
    if threads is not None:
        torch.set_num_threads(threads)
    scale = Scale(steps, batch, rows, Sizes(samples, held_out), rate, deployed)
    run = SmallPaper(start, out, scale, seed)
    run.prepare()
    models = {}
    for name, benchmarks in BENCHMARKS.items():
        models[name] = run.train(name)
        for benchmark in benchmarks:
            run.measure(PRETRAIN, models[PRETRAIN], benchmark)
            run.measure(name, models[name], benchmark)
    print_table(results(), run.table())
    return 0


run = program.program("paper-small", paper_small)

if __name__ == "__main__":
    program.main(run)
