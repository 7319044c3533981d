"""`mmi evaluate`: a model on held-out synthetic scenes, or a file of predictions on a benchmark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import MOST_THREADS, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.cli.target_options import MACHINE, Device, Kernels, TargetName, check_engines
from mmi_deploy.errors import ConfigError
from mmi_deploy.hub.kinds import BUNDLE_OR_MODEL, MODEL
from mmi_deploy.spec.backends import AUTO, CPU
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown
from mmi_train.cli.benchmark_scores import questions_of, score_predictions
from mmi_train.cli.choices import World
from mmi_train.evaluation.benchmarks.scores import options_of

# Model that is evaluated if none is given.
_TINY = Path("assets/tiny")

# Headings of the options for benchmarks.
_BENCHMARK = "Benchmarks"
_ANSWERS = "Answers to a benchmark"

# Options of drawn scenes, of a model's answers to a benchmark, and of their scores, with what they
# are of.
_WORLD = (
    "is of drawn scenes, which are measured without --benchmark",
    "world emoji count guidance full_every without seed pictures".split(),
)
_ANSWERING = (
    "is of answers that a model gives",
    "prompt beams shard candidates steps target device kernels threads slots unproved".split(),
)
_SCORING = (
    "needs the answers to score",
    "benchmark data split prompt beams out shard against submission published weights segmenter "
    "candidates meteor".split(),
)
_MACHINE = (
    "is of a model that answers a benchmark",
    "target device kernels threads slots unproved".split(),
)


def _given(context: typer.Context, name: str) -> bool:
    """True if an option is in the command line. Sources are compared by name, since versions of
    typer bring a click of their own."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_unused(
    context: typer.Context, options: tuple[str, list[str]], fix: str = "leave it out"
) -> None:
    """Raise `ConfigError` for an option that was given and has no meaning here."""
    why, names = options
    for name in names:
        if _given(context, name):
            raise ConfigError(f"--{name.replace('_', '-')} {why}", fix=fix)


def evaluate(
    context: typer.Context,
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A model folder, with --benchmark also a bundle; or hf://org/name.",
            show_default="assets/tiny",
        ),
    ] = None,
    world: Annotated[
        World, typer.Option(help="Difficulty of the synthetic scenes.", rich_help_panel="Questions")
    ] = "easy",
    emoji: Annotated[
        Path | None,
        typer.Option(
            help="Ask about this emoji set in place of scenes; trained and held-out names apart.",
            metavar="DIR",
            rich_help_panel="Questions",
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Questions of each kind.", metavar="N", rich_help_panel="Questions"
        ),
    ] = 96,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Denoising steps of a picture, in PyTorch.",
            show_default="20, of a consistency model 4",
            metavar="N",
            rich_help_panel="Pictures",
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Guidance scale of pictures.",
            show_default="3.5, or as distilled",
            metavar="X",
            rich_help_panel="Pictures",
        ),
    ] = None,
    full_every: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Run the whole U-Net in every Nth step.",
            rich_help_panel="Pictures",
        ),
    ] = 1,
    without: Annotated[
        bool,
        typer.Option(
            "--without/--only-with",
            help="Also measure with MMFS switched off.",
            rich_help_panel="Questions",
        ),
    ] = True,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the questions.", metavar="N", rich_help_panel="Questions"
        ),
    ] = 0,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Contact sheet of the drawn pictures: a new .png file.",
            dir_okay=False,
            rich_help_panel="Pictures",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help='Score these answers instead of a model\'s: lines of {"id": …, "text": …}.',
            metavar="FILE",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Benchmark of the paper, such as vqav2.",
            metavar="NAME",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of its annotations.", metavar="DIR", rich_help_panel=_BENCHMARK),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the set, if not the usual one.",
            metavar="NAME",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Named prompt in place of the set's own, such as vqa-appendix.",
            metavar="NAME",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beams of the search for each answer; 1: greedy.",
            metavar="N",
            show_default="as published",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Answers of the model: a .jsonl file; of the same run, it is continued. With "
            "--against: the comparison, a new .json file.",
            metavar="FILE",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Answer one part of the questions, such as 2/8, and do not score.",
            metavar="I/N",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with these answers to the same questions.",
            metavar="FILE",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(
            help="Write the file that the set's server scores: a new .json file.",
            metavar="FILE",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    published: Annotated[
        list[str] | None,
        typer.Option(
            help="Follow a rule of the published evaluation, such as extract-answer (repeatable).",
            metavar="RULE",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the networks that a metric needs.",
            metavar="DIR",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    segmenter: Annotated[
        str | None,
        typer.Option(
            help="What makes ADE20K's maps of drawn pictures: FILE.onnx or module:function.",
            metavar="NAME",
            rich_help_panel=_BENCHMARK,
        ),
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Pictures drawn of each caption, of which CLIP chooses.",
            metavar="N",
            rich_help_panel=_ANSWERS,
        ),
    ] = 1,
    meteor: Annotated[
        bool,
        typer.Option(
            "--meteor",
            help="Also score captions by METEOR, which needs Java.",
            rich_help_panel=_BENCHMARK,
        ),
    ] = False,
    target: TargetName = CPU,
    device: Device = 0,
    kernels: Kernels = AUTO,
    threads: Annotated[
        int,
        typer.Option(
            min=0,
            max=MOST_THREADS,
            help="CPU threads; 0: one per core.",
            metavar="N",
            rich_help_panel=MACHINE,
        ),
    ] = 0,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions at once.",
            metavar="N",
            show_default="as many as the memory holds",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    unproved: Annotated[
        bool,
        typer.Option("--unproved", help="Run engines without a receipt.", rich_help_panel=MACHINE),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a model on held-out scenes: answers, boxes and drawings, each checked exactly.

    The column "MMFS off" shows the accuracy without features of earlier pictures. With --emoji, a
    model that was trained on emoji is asked about them.

    With --benchmark, a bundle or a model folder answers one of the paper's benchmarks, and the
    answers are scored; with --predictions too, those of a file are.
    """
    if benchmark is not None or predictions is not None:
        _check_unused(context, _WORLD)
    if benchmark is not None and predictions is None:
        if model is None or data is None or out is None:
            missing = "a bundle" if model is None else "--data DIR" if data is None else "-o FILE"
            raise ConfigError(
                f"--benchmark needs {missing}",
                expected=f"mmi evaluate BUNDLE --benchmark {benchmark} --data DIR -o FILE.jsonl",
                fix="or score answers that you have with --predictions FILE",
            )
        with extras("evaluate"):
            from mmi_deploy.cli.machine import Machine
            from mmi_train.cli.benchmark_answers import Shard, answer_and_score
            from mmi_train.cli.benchmark_models import benchmark_model

            check_engines(target)
            folder = local_folder(model, BUNDLE_OR_MODEL, targets=[target])
            machine = Machine(folder, target, kernels, threads, device, None, slots, unproved)
            answering = benchmark_model(machine, steps if _given(context, "steps") else None)
        answer_and_score(
            answering,
            benchmark,
            data,
            split,
            out,
            options_of(published or (), weights, meteor, segmenter, data),
            prompt=prompt,
            beams=beams,
            shard=Shard.parse(shard) if shard is not None else None,
            candidates=candidates,
            against=against,
            submission=submission,
            as_json=as_json,
        )
        return
    if predictions is not None:
        if model is not None:
            raise ConfigError(
                "--predictions scores a file alone", got=f"the model {model} too", fix="omit one"
            )
        _check_unused(context, _ANSWERING)
        if out is not None and against is None:
            raise ConfigError("-o is of answers that a model gives, or of --against")
        score_predictions(
            predictions,
            questions_of(benchmark, data, split),
            options_of(published or (), weights, meteor, segmenter, data),
            against=against,
            submission=submission,
            as_json=as_json,
            out=out,
        )
        return
    _check_unused(context, _SCORING, "add --predictions FILE")
    _check_unused(context, _MACHINE, "add --benchmark NAME, or leave it out")
    if pictures is not None:
        prepare_file(pictures)
    named = spelled(model or _TINY)
    model = local_folder(model or _TINY, MODEL)
    if emoji is not None:
        for name in ("world", "full_every"):
            if _given(context, name):
                raise ConfigError(f"--{name.replace('_', '-')} is of scenes, not of --emoji")
        with extras("evaluate"):
            from mmi_train.cli.evaluate_emoji import evaluate_emoji
        evaluate_emoji(
            model,
            named,
            emoji,
            count=count,
            steps=steps,
            guidance=guidance,
            seed=seed,
            without=without,
            pictures=pictures,
            as_json=as_json,
        )
        return
    with shown(remarks(), f"evaluating {named}") as progress:
        with extras("evaluate"):
            from mmi_deploy.documents.tokenizer import Tokenizer, read_tokenizer_file
            from mmi_train.data.synthetic import world as worlds
            from mmi_train.evaluation.contact_sheet import contact_sheet
            from mmi_train.evaluation.synthetic_tasks import evaluate as evaluation_of
            from mmi_train.weights.model_folder import TOKENIZER, load_model
        loaded = load_model(model)
        Tokenizer.open(model / TOKENIZER, loaded.config.tokens)  # raises for another model's
        tokenizer = read_tokenizer_file(model / TOKENIZER)
        evaluation = evaluation_of(
            loaded,
            tokenizer,
            getattr(worlds, world)(),
            count=count,
            steps=steps,
            guidance=guidance,
            full_every=full_every,
            seed=seed,
            without=without,
            progress=progress,
        )
    found = evaluation.as_json()
    if pictures is not None:
        sheet = io.BytesIO()
        contact_sheet(evaluation.samples).save(sheet, "PNG")
        write_new_file(pictures, sheet.getvalue())
    if as_json:
        print_json(found)
        return
    objects = sorted({count for entry in found.values() for count in entry["by_objects"]})
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)  # fits into 80 columns
    table.add_column("measure", no_wrap=True)
    headings = ["asked", "right", *(["MMFS off"] if without else [])]
    for heading in [*headings, *(f"{count} object" + "s" * (count != "1") for count in objects)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in found.items():
        row = [name, str(entry["count"]), f"{entry['value']:.3f}"]
        row += [f"{entry['without_mmfs']:.3f}"] if without else []
        values = (entry["by_objects"].get(count) for count in objects)
        row += ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(*row)
    results().print(table)
