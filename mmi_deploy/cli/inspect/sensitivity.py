"""`mmi inspect --sensitivity`: which weights suffer most when they are stored in few bits."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from mmi_deploy.cli.console import print_json, results, staged
from mmi_deploy.cli.inspect.cost import print_table

SHOWN = 25
"""Rows of the table; `--json` has every weight."""


def show_sensitivity(folder: Path, graph: str, precision: str, as_json: bool) -> None:
    """Quantise one weight at a time, run recorded inputs, and print what the results differ by."""
    from mmi_deploy.analysis.sensitivity import sensitivity
    from mmi_deploy.bundle.bundle import Bundle

    bundle = Bundle.open(folder, unproved=True)
    with staged("recording a document") as stage:
        layers = sensitivity(bundle, graph, precision, on_layer=stage)
    if as_json:
        told = {"graph": graph, "precision": precision, "weights": [vars(one) for one in layers]}
        print_json(told)
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{folder}: {graph}, one weight at a time as {precision}",
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
    out.print(f"{more}Error: root mean square of the difference over that of the results")
