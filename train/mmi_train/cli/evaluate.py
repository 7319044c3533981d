"""`mmi evaluate`: accuracy of a trained model on held-out synthetic scenes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown
from mmi_train.cli.choices import World


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model folder.")] = Path("assets/tiny"),
    world: Annotated[
        World, typer.Option(help="Difficulty of the synthetic scenes.", rich_help_panel="Questions")
    ] = "easy",
    count: Annotated[
        int,
        typer.Option(
            min=1, help="Questions of each kind.", metavar="N", rich_help_panel="Questions"
        ),
    ] = 96,
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Denoising steps of a picture.", metavar="N", rich_help_panel="Pictures"
        ),
    ] = 20,
    guidance: Annotated[
        float,
        typer.Option(
            min=0, help="Guidance scale of pictures.", metavar="X", rich_help_panel="Pictures"
        ),
    ] = 3.5,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a model on held-out scenes: answers, boxes and drawings, each checked exactly.

    The column "MMFS off" shows the accuracy without features of earlier pictures.
    """
    if pictures is not None:
        prepare_file(pictures)
    with shown(remarks(), f"evaluating {model}") as progress:
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
