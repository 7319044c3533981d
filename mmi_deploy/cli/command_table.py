"""Table of the commands of `mmi`; the module of a command is imported when the command runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mmi_deploy.cli.program import help_of
from mmi_deploy.system.entry_points import load

MODELS, BUNDLES, RESULTS = "Models", "Bundles and engines", "Use and measure"


@dataclass(frozen=True)
class Row:
    """One command. entry_point: its function, or a `typer.Typer` of subcommands. help: the line in
    the list of commands. extra: optional dependencies (extra of `mmi_deploy`) that it requires.
    section: heading in the list. examples: shown below its own help."""

    entry_point: str
    help: str
    extra: str | None = None
    section: str | None = None
    examples: tuple[str, ...] = ()


COMMANDS: Mapping[str, Row] = {
    "train": Row(
        "mmi_train.cli.train:train",
        "Train a model further on your own documents.",
        "train",
        MODELS,
        (
            "mmi train models/mine --data documents.jsonl -o runs/mine",
            "mmi train models/mine --data llava.json --images coco/ -o runs/mine --epochs 1",
            "mmi train models/mine --data refcoco:data/refcoco -o runs/mine --recipe grounding",
            "mmi train --recipe stories --set batch=2 --print-recipe",
            "mmi train models/mine --data documents.jsonl --plan --gpus 8 --memory 80GB",
        ),
    ),
    "train-tiny": Row(
        "mmi_train.cli.train_tiny:train_tiny",
        "Train the tiny model from scratch on synthetic pictures.",
        "train",
        MODELS,
        (
            "mmi train-tiny -o runs/tiny",
            "mmi train-tiny -o runs/trial --steps 100",
            "mmi train-tiny -o runs/more --start assets/tiny --world medium",
            "mmi train-tiny -o runs/emoji --emoji data/emoji",
        ),
    ),
    "convert": Row(
        "mmi_train.cli.convert:convert",
        "Convert the published checkpoint to a model folder.",
        "train",
        MODELS,
        (
            "mmi convert mm_interleaved_13b/ -o models/13b --tokenizer vicuna-13b/",
            "mmi convert hf://OpenGVLab/MM-Interleaved/mm_interleaved_pretrain -o models/13b "
            "--tokenizer hf://lmsys/vicuna-13b-v1.3",
        ),
    ),
    "init": Row(
        "mmi_train.cli.init:init",
        "Assemble a model from a pretrained LLaMA, CLIP and Stable Diffusion.",
        "init",
        MODELS,
        (
            "mmi init -o models/mine --llm SmolLM2-135M/ --vision clip-base-patch16/",
            "mmi init -o models/mine --llm smollm2.gguf --context 2048",
        ),
    ),
    "delta": Row(
        "mmi_train.cli.delta:app",
        "Keep what a model learned apart from its base; merge a delta, or LoRA adapters.",
        "train",
        MODELS,
        ("mmi delta apply models/13b runs/mine/adapters -o models/mine",),
    ),
    "data": Row(
        "mmi_train.cli.data:app",
        "Check data sets in their published formats.",
        "train",
        MODELS,
        ("mmi data check coco-caption coco/ --show 3",),
    ),
    "evaluate": Row(
        "mmi_train.cli.evaluate:evaluate",
        "Evaluate a model on held-out pictures, or answers on the paper's benchmarks.",
        "train",
        MODELS,
        (
            "mmi evaluate assets/tiny --count 32",
            "mmi evaluate bundles/mine --benchmark vqav2 --data vqav2/ -o answers.jsonl",
            "mmi evaluate --predictions answers.jsonl --benchmark vqav2 --data vqav2/",
            "mmi evaluate --predictions int8.jsonl --against fp32.jsonl --benchmark okvqa "
            "--data okvqa/ --json",
        ),
    ),
    "ablate": Row(
        "mmi_train.cli.ablate:ablate",
        "Train and table the paper's ablations on the drawn world.",
        "train",
        MODELS,
        (
            "mmi ablate mmfs -o runs/ablations",
            "mmi ablate mmfs losses --steps 200 --questions 32 --share 0.5",
        ),
    ),
    "export": Row(
        "mmi_export.cli:export",
        "Export a model folder to ONNX and compare every graph with PyTorch.",
        "export",
        BUNDLES,
        (
            "mmi export assets/tiny -o bundles/tiny",
            "mmi export runs/tiny/model -o bundles/mine --schedule unipc:10 --schedule ddim:50",
        ),
    ),
    "build": Row(
        "mmi_deploy.cli.build:build",
        "Build engines for GPUs, or quantised graphs for the CPU.",
        "build",
        BUNDLES,
        (
            "mmi build --target cpu --precision int8",
            "mmi build bundles/tiny --arch sm89 --arch sm120",
            "mmi build --arch sm80 --dry-run",
        ),
    ),
    "verify": Row(
        "mmi_deploy.cli.verify:verify",
        "Verify checksums and receipts of a bundle, or engines of a target.",
        "cpu",
        BUNDLES,
        (
            "mmi verify bundles/tiny --run",
            "mmi verify bundles/tiny --target tensorrt-sm89-fp16",
            "mmi verify bundles/tiny --target cpu-int8 --json",
            "mmi verify bundles/tiny --target cpu-int8 --answers comparison.json",
        ),
    ),
    "push": Row(
        "mmi_deploy.cli.push:push",
        "Upload a bundle or a model folder to the Hugging Face Hub.",
        "hub",
        BUNDLES,
        (
            "mmi push bundles/mine hf://org/name --dry-run",
            "mmi push bundles/mine hf://org/name --private",
            "mmi push runs/mine/model hf://org/name@trial --message 'After two epochs'",
        ),
    ),
    "inspect": Row(
        "mmi_deploy.cli.inspect.app:app",
        "Show parts, cost, memory, GPUs, targets and sensitivity of a model.",
        "build",
        BUNDLES,
        (
            "mmi inspect bundles/tiny --tensors",
            "mmi inspect assets/tiny",
            "mmi inspect --preset released_13b",
            "mmi inspect cost bundles/tiny --graph llm",
            "mmi inspect memory bundles/tiny --fit 24GB",
        ),
    ),
    "plugins": Row(
        "mmi_plugins.cli:app",
        "Compile the MMFS kernels for ONNX Runtime and TensorRT.",
        None,
        BUNDLES,
        ("mmi plugins build onnxruntime", "mmi plugins list"),
    ),
    "generate": Row(
        "mmi_deploy.cli.generate:generate",
        "Continue a document with text and pictures.",
        "cpu",
        RESULTS,
        (
            "mmi generate examples/story.md -o out",
            "mmi generate examples/story.md --seed 7 --max-images 2 --temperature 0.7",
            "mmi generate examples/story.md --json | jq .parts",
            "mmi generate examples/story.md examples/question.md -o out",
            "mmi generate examples/documents.jsonl -o results.jsonl",
        ),
    ),
    "triton": Row(
        "mmi_deploy.cli.triton:triton",
        "Write a model for Triton Inference Server.",
        None,
        RESULTS,
        (
            "mmi triton models bundles/tiny",
            "mmi triton models bundles/13b --target tensorrt-sm90-fp16 --server-bundle /bundle",
        ),
    ),
    "serve": Row(
        "mmi_deploy.cli.serve:serve",
        "Serve a bundle over HTTP: OpenAI's APIs, and a page to write with.",
        "serve",
        RESULTS,
        (
            "mmi serve bundles/tiny",
            "mmi serve bundles/13b --target tensorrt-sm89-fp16 --host 0.0.0.0 --key-file keys.txt",
            "mmi serve bundles/13b --target tensorrt-sm90-fp16 --device 0 --device 1",
        ),
    ),
    "bench": Row(
        "mmi_bench.cli.app:app",
        "Benchmark the runtime against PyTorch, many documents at once, one graph, growth of cost.",
        "bench",
        RESULTS,
        (
            "mmi bench --quick",
            "mmi bench bundles/tiny -m assets/tiny -o bench.json --plot bench.svg",
            "mmi bench --reading released --size small --repeats 3",
            "mmi bench batch bundles/tiny",
            "mmi bench serve bundles/tiny --concurrency 4 -o run",
            "mmi bench graph denoise_step bundles/tiny",
            "mmi bench scale bundles/tiny --plot scale.svg",
        ),
    ),
}

BENCH: Mapping[str, Row] = {
    "pytorch": Row(
        "mmi_bench.cli.bench:bench",
        "Benchmark the runtime against the same weights in PyTorch (also without the word).",
        "bench",
        examples=(
            "mmi bench --quick",
            "mmi bench bundles/tiny -m assets/tiny -o bench.json --plot bench.svg",
            "mmi bench --reading released --size small --repeats 3",
        ),
    ),
    "batch": Row(
        "mmi_bench.cli.batch:batch",
        "Benchmark many documents at once against the same documents one after another.",
        "cpu",
        examples=(
            "mmi bench batch --quick",
            "mmi bench batch bundles/tiny --workload text --rows 1 --rows 8 -o batch.json",
        ),
    ),
    "serve": Row(
        "mmi_bench.cli.serve:serve",
        "Benchmark a server: latency, throughput and goodput under load, outputs checked.",
        "bench",
        examples=(
            "mmi bench serve bundles/tiny --workload story --concurrency 4 -o run",
            "mmi bench serve http://127.0.0.1:8000 --rate 2 --goodput ttft=200ms,image=2s",
            "mmi bench serve bundles/tiny --workload documents.jsonl --offline --requests 100",
        ),
    ),
    "compare": Row(
        "mmi_bench.cli.compare_results:compare_results",
        "Compare two results of `mmi bench serve`, with confidence intervals.",
        "bench",
        examples=("mmi bench compare before after --fail-above 5%",),
    ),
    "graph": Row(
        "mmi_bench.cli.graph:graph",
        "Benchmark one graph of a bundle alone, in trtexec's words.",
        "cpu",
        examples=(
            "mmi bench graph --list bundles/tiny",
            "mmi bench graph denoise_step bundles/tiny",
            "mmi bench graph llm --sizes t=128,m=4 --export-times runs.json",
            "mmi bench graph all --rows 1 --rows 8 --json",
        ),
    ),
    "mmfs": Row(
        "mmi_bench.cli.mmfs:mmfs",
        "Benchmark the MMFS operator alone: our kernel, its ONNX function, GridSample.",
        "build",
        examples=(
            "mmi bench mmfs",
            "mmi bench mmfs bundles/tiny --part image_decoder --images 1",
            "mmi bench mmfs --preset released_13b --queries 1 --queries 2048 -o mmfs.json",
        ),
    ),
    "scale": Row(
        "mmi_bench.cli.scale:scale",
        "Benchmark the growth of time and memory with images, tokens, rows and steps.",
        "cpu",
        examples=(
            "mmi bench scale --quick",
            "mmi bench scale bundles/tiny -o scale.json --plot scale.svg --check",
        ),
    ),
}

INSPECT: Mapping[str, Row] = {
    "parts": Row(
        "mmi_deploy.cli.inspect.parts:parts",
        "Parts of a preset, a model folder or a bundle (also without the word `parts`).",
        examples=("mmi inspect bundles/tiny --tensors", "mmi inspect --preset released_13b"),
    ),
    "cost": Row(
        "mmi_deploy.cli.inspect.cost:cost",
        "FLOPs, bytes and roofline time of every graph.",
        "build",
        examples=(
            "mmi inspect cost bundles/tiny",
            "mmi inspect cost bundles/tiny --graph llm --sizes t=1,m=4 --gpu l4",
        ),
    ),
    "memory": Row(
        "mmi_deploy.cli.inspect.memory:memory",
        "Memory by precision, and the precision that fits a GPU.",
        "build",
        examples=("mmi inspect memory bundles/tiny", "mmi inspect memory bundles/13b --fit 24GB"),
    ),
    "gpus": Row(
        "mmi_deploy.cli.inspect.gpus:gpus",
        "For every GPU: the precision that fits it, and lower bounds of its times.",
        "build",
        examples=("mmi inspect gpus bundles/tiny --gpu l4 --gpu orin-64",),
    ),
    "batch": Row(
        "mmi_bench.cli.inspect_batch:inspect_batch",
        "Documents at once: computed tokens and steps a second of a GPU, slots that fit it.",
        "build",
        examples=("mmi inspect batch bundles/13b --gpu h100 --gpu l4",),
    ),
    "target": Row(
        "mmi_deploy.cli.inspect.target:target",
        "One target of a bundle, graph by graph: layers, sizes, receipts.",
        examples=("mmi inspect target bundles/tiny cpu-int8",),
    ),
    "sensitivity": Row(
        "mmi_deploy.cli.inspect.sensitivity:sensitivity",
        "Error of each weight alone when it is quantised.",
        "build",
        examples=("mmi inspect sensitivity bundles/tiny --graph llm --precision int4",),
    ),
    "flops-saved": Row(
        "mmi_bench.cli.flops_saved:flops_saved",
        "FLOPs as deployed beside those of the model as published.",
        "export",
        examples=("mmi inspect flops-saved bundles/tiny",),
    ),
}

DATA: Mapping[str, Row] = {
    "check": Row(
        "mmi_train.cli.data_check:check",
        "Count the samples of a data set, say what is left out and why, show the first.",
        "train",
        examples=(
            "mmi data check coco-caption coco/ --show 3",
            "mmi data check refcoco refcoco/ --split testA --json",
            "mmi data check mmc4 mmc4/ --quick --sheet mmc4.png",
        ),
    ),
    "emoji": Row(
        "mmi_train.cli.data_emoji:emoji",
        "Make an emoji set, which train-tiny takes, from two npm packages.",
        "data",
        examples=(
            "mmi data emoji --icons iconify-json-fluent-emoji-flat-1.2.6.tgz "
            "--keywords emojilib-4.0.3.tgz -o data/emoji",
        ),
    ),
}

DELTA: Mapping[str, Row] = {
    "make": Row(
        "mmi_train.cli.delta_make:make",
        "Write the weights in which a model differs from its base.",
        "train",
        examples=("mmi delta make assets/tiny runs/lcm/model -o four_steps",),
    ),
    "apply": Row(
        "mmi_train.cli.delta_apply:apply",
        "Write the model that a base and a delta, or LoRA adapters, are together.",
        "train",
        examples=(
            "mmi delta apply assets/tiny four_steps -o models/tiny-4",
            "mmi delta apply models/13b runs/mine/adapters -o models/mine",
        ),
    ),
}

# Commands of several views, each a command of its own.
VIEWS = {"bench": BENCH, "data": DATA, "delta": DELTA, "inspect": INSPECT}


def row_of(words: str) -> Row:
    """Row of a command, such as `generate` or `inspect cost`."""
    command, _, view = words.partition(" ")
    return VIEWS[command][view] if view else COMMANDS[command]


class TableGroup(TyperGroup):
    """Group of commands from a table; each is a placeholder until it runs."""

    rows: Mapping[str, Row] = {}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that `args` begin with, then resolve it as typer does."""
        if args and args[0] in self.rows:
            self.commands[args[0]] = _imported(args[0], self.rows[args[0]])
        return super().resolve_command(ctx, args)


def table_app(group: type[TableGroup], **options: Any) -> typer.Typer:
    """A `typer.Typer` that lists the rows of `group` and imports none of them."""
    app = _app(cls=group, **options)
    for name, row in group.rows.items():
        app.command(name, help=row.help, rich_help_panel=row.section)(_placeholder)
    return app


def _imported(name: str, row: Row) -> Any:
    found = load(row.entry_point)
    heading = "Example:" if len(row.examples) == 1 else "Examples:"
    epilog = "\n\n".join([heading, *row.examples])
    if isinstance(found, typer.Typer):
        found.info.epilog = epilog
        return get_command(found)
    app = _app()
    app.command(name, help=help_of(found), epilog=epilog)(found)
    return get_command(app)


def _app(**options: Any) -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **options,
    )


def _placeholder() -> None:
    """Placeholder in the list of commands; `TableGroup` runs the row's entry point instead."""
    raise AssertionError("the group imports the command before it runs")
