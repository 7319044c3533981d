"""Plot of the batch benchmark: speed-up by documents at once."""

from __future__ import annotations

from pathlib import Path

from mmi_bench.batch.measure import BatchResult
from mmi_deploy.system.plots import plotted

_COLOURS = {"text": "#0072b2", "pictures": "#d55e00", "documents": "#009e73"}


def draw(result: BatchResult, path: Path) -> None:
    """Write the plot to `path`, whose suffix (`.svg`, `.png`) is the format; raises `MmiError`
    without matplotlib."""
    with plotted(path, 5.5, 3.8) as figure:
        axes = figure.subplots()
        for name in dict.fromkeys(cell.workload for cell in result.cells):
            cells = [cell for cell in result.cells if cell.workload == name]
            speeds = [cell.speedup for cell in cells]
            axes.errorbar(
                [cell.rows for cell in cells],
                [one.median for one in speeds],
                yerr=[[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]],
                marker="o",
                capsize=3,
                color=_COLOURS[name],
                label=name,
            )
        if result.bounds:
            axes.plot(
                [one.rows for one in result.bounds],
                [one.bound for one in result.bounds],
                "--",
                color=_COLOURS["documents"],
                label="documents: bound of the runs",
            )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({cell.rows for cell in result.cells}))
        axes.set_xlabel("documents at once")
        axes.set_ylabel("times as fast as one after another")
        axes.legend(frameon=False)
