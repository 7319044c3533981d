"""`mmi data check`: samples of a data set, counted and shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from mmi_deploy.cli.console import counted, print_json, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import prepare_file, write_new_file
from mmi_deploy.system.progress import shown

# Files that are named.
_FILES = 4


def check(
    name: Annotated[
        str, typer.Argument(help="The data set, such as coco-caption.", metavar="NAME")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Its folder.", file_okay=False)],
    split: Annotated[
        str | None,
        typer.Option(help="The split.", show_default="the first that is there", metavar="NAME"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The prompt, by its name.", show_default="the set's own", metavar="NAME"),
    ] = None,
    show: Annotated[int, typer.Option(min=0, max=1000, help="Documents to show.", metavar="N")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Look for pictures, but do not decode them.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.", metavar="N")] = 0,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet of the documents: a new .png file.", dir_okay=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the samples of a data set, say what is left out and why, and show the first ones.

    Nothing is written into its folder. A sample is left out by the rules of the set, or because a
    picture of it is missing or cannot be decoded.
    """
    if sheet is not None:
        prepare_file(sheet)
    with shown(remarks(), f"checking {folder}") as progress:
        with extras("data check"):
            from mmi_train.data.readers.check import check_set, contact_sheet, document_text
            from mmi_train.data.readers.data_set import Settings
            from mmi_train.data.readers.registry import open_set
        data = open_set(name, folder, Settings(split=split, prompt=prompt, seed=seed))
        report = check_set(data, show, decode=not quick, progress=progress)
    if sheet is not None:
        if not report.documents:
            raise DocumentError(f"{folder} holds no document for a contact sheet")
        image = io.BytesIO()
        contact_sheet(report.documents).save(image, "PNG")
        write_new_file(sheet, image.getvalue())
    if as_json:
        print_json(report.as_json())
        return
    out = results()
    found = counted(report.samples, "sample")
    out.print(f"{name}, split {data.split}: {found}, {report.skipped.total()} left out")
    names = [path.relative_to(folder).as_posix() for path in data.files]
    more = [f"{len(names) - _FILES} more"] if len(names) > _FILES else []
    if names:
        out.print(f"read from {', '.join([*names[:_FILES], *more])}", markup=False)
    if report.skipped:
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
        table.add_column("left out because")
        table.add_column("samples", justify="right")
        table.add_column("the first")
        for reason, count in report.skipped.most_common():
            table.add_row(escape(reason), str(count), escape(report.examples.get(reason, "")))
        out.print(table)
    for number, sample in enumerate(report.documents, 1):
        out.print(f"{number}. {document_text(sample)}", markup=False)
        if sample.answers:
            out.print(f"   answers: {' | '.join(sample.answers)}", markup=False)
