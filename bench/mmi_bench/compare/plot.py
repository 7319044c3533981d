"""A comparison as a picture: what a token costs by images in context, and the speedups."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mmi_bench.compare.backends import BACKENDS
from mmi_bench.compare.compare import Comparison
from mmi_bench.statistics import Statistics
from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import write_new_file

_COLOURS = {"runtime": "#0072b2", "pytorch": "#d55e00"}
_LABELS = {"runtime": "runtime", "pytorch": "PyTorch as published"}
_SHOWN = 5
"""The first measures are shown as bars; those by number of images as lines."""


def draw(comparison: Comparison, path: Path) -> None:
    """Write `path`, whose ending (`.svg`, `.png`) is its format; raises `MmiError` without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MmiError(
            "plots need matplotlib, which is not installed", fix="pip install matplotlib"
        ) from None
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    tokens, speedups = figure.subplots(1, 2)
    _per_token(tokens, comparison)
    _speedups(speedups, comparison)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    write_new_file(path, drawn.getvalue())


def _per_token(axes: Any, comparison: Comparison) -> None:
    counts = comparison.image_counts
    for side in BACKENDS:
        metrics = [comparison.per_token(images) for images in counts]
        spreads = [Statistics.of(getattr(metric, side)) for metric in metrics]
        medians = [1000 * spread.median for spread in spreads]
        below = [1000 * (spread.median - spread.low) for spread in spreads]
        above = [1000 * (spread.high - spread.median) for spread in spreads]
        axes.errorbar(
            counts,
            medians,
            yerr=[below, above],
            marker="o",
            capsize=3,
            color=_COLOURS[side],
            label=_LABELS[side],
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts)
    axes.set_xlabel("images in a context of equal length")
    axes.set_ylabel("milliseconds per token")
    axes.set_title("What a token costs")
    axes.legend(frameon=False)


def _speedups(axes: Any, comparison: Comparison) -> None:
    metrics = comparison.metrics()[:_SHOWN][::-1]
    spreads = [metric.speedup for metric in metrics]
    medians = [spread.median for spread in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    bars = axes.barh(
        [metric.name for metric in metrics],
        medians,
        xerr=errors,
        capsize=3,
        color=_COLOURS["runtime"],
    )
    axes.bar_label(bars, [f"{median:.1f}x" for median in medians], padding=4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as PyTorch as published (median, quartiles)")
    axes.set_title("Speedup")
