"""`mmi inspect flops-saved`: FLOPs of the graphs beside those of the model as published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from mmi_deploy.cli.console import flops, print_json, print_table, results
from mmi_deploy.cli.extras import extras
from mmi_deploy.cli.inspect.source import AsJson, Folder, Preset, graphs_of

if TYPE_CHECKING:
    from mmi_deploy.bundle.manifest import BundleManifest


def flops_saved(folder: Folder = None, preset: Preset = None, as_json: AsJson = False) -> None:
    """Compare the FLOPs of the graphs with those of the model as published."""
    with extras("inspect flops-saved"):
        import mmi_bench.flops_saved  # noqa: F401
    graphs = graphs_of(folder, preset)
    show_flops_saved(graphs.manifest, graphs.files, as_json)


def show_flops_saved(manifest: BundleManifest, files: Mapping[str, Path], as_json: bool) -> None:
    """Print FLOPs as published and as deployed, and those of repeated computations."""
    from mmi_bench.flops_saved import compare, repeated, repeated_in_step

    rows = compare(manifest.config, manifest.limits, files)
    again = repeated(manifest.config)
    left = repeated_in_step(manifest.config, manifest.limits, files["denoise_step"])
    if as_json:
        print_json(
            {
                "model": manifest.config.name,
                "context": manifest.limits.context,
                "rows": [{**vars(row), "ratio": row.ratio} for row in rows],
                "repeated": again,
                "repeated_in_a_deployed_step": left.flops,
            }
        )
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{manifest.config.name}: matrix FLOPs at a context of {manifest.limits.context}",
        title_justify="left",
    )
    table.add_column("work")
    for heading in ("as published", "deployed", "times fewer"):
        table.add_column(heading, justify="right")
    for row in rows:
        before = "-" if row.published is None else flops(row.published)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, before, flops(row.deployed), ratio)
    out = results()
    print_table(out, table)
    for what, count in again.items():
        out.print(f"As published, {what}: {flops(count)}FLOP")
    out.print(
        f"Deployed, repeated by every denoising step although its inputs do not change: "
        f"{flops(left.flops)} FLOP"
    )
