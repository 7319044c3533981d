"""Plot of a comparison: time per token by images in context, and speedups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmi_bench.compare.backends import COMPILED, LABELS, PYTORCH, RUNTIME
from mmi_bench.compare.compare import Comparison
from mmi_deploy.system.plots import plotted

_COLOURS = {RUNTIME: "#0072b2", PYTORCH: "#d55e00", COMPILED: "#009e73"}

# Number of measures that are shown as bars; those by number of images are shown as lines.
_SHOWN = 5


def draw(comparison: Comparison, path: Path) -> None:
    """Write the plot to `path`, whose suffix (`.svg`, `.png`) is the format; raises `MmiError`
    without matplotlib."""
    with plotted(path, 10, 3.8) as figure:
        tokens, speedups = figure.subplots(1, 2)
        _per_token(tokens, comparison)
        _speedups(speedups, comparison)


def _per_token(axes: Any, comparison: Comparison) -> None:
    counts = comparison.image_counts
    for backend in comparison.backends:
        metrics = [comparison.per_token(images) for images in counts]
        measured = [metric.of(backend) for metric in metrics]
        medians = [1000 * one.median for one in measured]
        below = [1000 * (one.median - one.low) for one in measured]
        above = [1000 * (one.high - one.median) for one in measured]
        axes.errorbar(
            counts,
            medians,
            yerr=[below, above],
            marker="o",
            capsize=3,
            color=_COLOURS[backend],
            label=LABELS[backend],
        )
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts)
    axes.set_xlabel("images in a context of equal length")
    axes.set_ylabel("milliseconds per token")
    axes.set_title("Time per token")
    axes.legend(frameon=False)


def _speedups(axes: Any, comparison: Comparison) -> None:
    metrics = comparison.metrics()[:_SHOWN][::-1]
    measured = [metric.speedup() for metric in metrics]
    medians = [one.median for one in measured]
    errors = [[s.median - s.low for s in measured], [s.high - s.median for s in measured]]
    bars = axes.barh(
        [metric.name for metric in metrics],
        medians,
        xerr=errors,
        capsize=3,
        color=_COLOURS[RUNTIME],
    )
    axes.bar_label(bars, [f"{median:.1f}x" for median in medians], padding=4)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as PyTorch as published (median, quartiles)")
    axes.set_title("Speedup")
