"""`mmi inspect sensitivity`: the error when one weight at a time is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, print_table, remarks, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.hub_folders import local_folder, spelled
from mmi_deploy.cli.inspect.source import AsJson, BundleFolder
from mmi_deploy.hub.kinds import BUNDLE
from mmi_deploy.system.progress import shown

# Rows of the table; `--json` lists every weight.
SHOWN = 25


def sensitivity(
    folder: BundleFolder,
    graph: Annotated[str, typer.Option(help="Graph whose weights are quantised.")] = "llm",
    precision: Annotated[str, typer.Option(help="Recipe that they are quantised with.")] = "int4",
    as_json: AsJson = False,
) -> None:
    """Quantise one weight at a time, run calibration inputs, and show the error of the outputs."""
    with extras("inspect sensitivity"):
        import mmi_deploy.analysis.sensitivity  # noqa: F401
    show_sensitivity(folder, graph, precision, as_json)


def show_sensitivity(folder: Path, graph: str, precision: str, as_json: bool) -> None:
    """Print the error of the outputs on recorded inputs when one weight at a time is quantised."""
    from mmi_deploy.analysis.sensitivity import sensitivity as measure
    from mmi_deploy.bundle.bundle import Bundle

    bundle = Bundle.open(local_folder(folder, BUNDLE), unproved=True)
    with shown(remarks(), "recording inputs") as progress:
        layers = measure(bundle, graph, precision, progress=progress)
    if as_json:
        report = {"graph": graph, "precision": precision, "weights": [vars(one) for one in layers]}
        print_json(report)
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{spelled(folder)}: {graph}, one weight at a time as {precision}",
        title_justify="left",
    )
    table.add_column("weight", overflow="fold")
    for heading in ("shape", "stored as", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in layers[:SHOWN]:
        stored = f"{one.dtype}, block {one.block}" if one.block else one.dtype
        table.add_row(one.name, f"{one.rows} × {one.columns}", stored, f"{one.error:.1e}")
    out = results()
    print_table(out, table)
    more = f"{len(layers) - SHOWN} more weights are in --json. " if len(layers) > SHOWN else ""
    out.print(f"{more}Error: relative RMS error of the results")
