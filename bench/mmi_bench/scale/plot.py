"""Plot of the scale benchmark: time and memory along each axis, on logarithmic scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmi_bench.scale.cases import (
    AXES,
    DECODE,
    DENOISE,
    ENCODE,
    LABELS,
    MEMORY,
    PICTURE,
    PREFILL,
    UNITS,
    VAE,
)
from mmi_bench.scale.expectations import LINEAR
from mmi_bench.scale.measure import ScaleResult, Series
from mmi_bench.statistics import Statistics
from mmi_deploy.system.plots import plotted

_STYLES = {
    ENCODE: ("#009e73", "s"),
    PREFILL: ("#cc79a7", "^"),
    DECODE: ("#0072b2", "o"),
    DENOISE: ("#d55e00", "D"),
    VAE: ("#e69f00", "v"),
    PICTURE: ("#555555", "P"),
    MEMORY: ("#0072b2", "o"),
}


def draw(result: ScaleResult, path: Path) -> None:
    """Write the plot to `path`, whose suffix (`.svg`, `.png`) is the format; raises `MmiError`
    without matplotlib."""
    with plotted(path, 13, 6.2) as figure:
        figure.set_facecolor("white")  # readable on a dark page too
        times, memory = figure.subplots(
            2, len(AXES), sharex="col", sharey="row", height_ratios=(2, 1)
        )
        for column, axis in enumerate(AXES):
            of_axis = [one for one in result.series if one.axis == axis]
            _panel(times[column], [one for one in of_axis if one.quantity != MEMORY], 1e3)
            _panel(memory[column], [one for one in of_axis if one.quantity == MEMORY], 1e-6)
            memory[column].set_xlabel(LABELS[axis])
        clock = "CPU time" if result.about["clock"] == "CPU" else "time"
        times[0].set_ylabel(f"{clock}, milliseconds")
        memory[0].set_ylabel("memory, MB")


def _panel(axes: Any, series: Sequence[Series], scale: float) -> None:
    """Lines of medians with quartiles."""
    for one in series:
        found = [Statistics.of(values) for values in zip(*one.rounds, strict=True)]
        colour, marker = _STYLES[one.quantity]
        axes.errorbar(
            one.points,
            [scale * point.median for point in found],
            yerr=[
                [scale * (point.median - point.low) for point in found],
                [scale * (point.high - point.median) for point in found],
            ],
            marker=marker,
            markersize=4,
            linewidth=1.2,
            capsize=2,
            color=colour,
            label=label(one),
        )
    axes.set_yscale("log")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    if series:
        points = sorted({x for one in series for x in one.points})
        axes.set_xscale("symlog", linthresh=1, linscale=0.5, base=2)
        axes.set_xticks(points, [str(x) for x in points])
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def label(series: Series) -> str:
    """Quantity with its exponent, or its growth by a unit of the axis."""
    fit, (count, unit) = series.fit, UNITS[series.axis]
    expected = series.expectation
    if fit.growth is not None and (expected is None or expected.kind != LINEAR):
        return f"{series.quantity}: {100 * count * fit.growth.value:+.1f} % per {unit}"
    if fit.exponent is not None:
        return f"{series.quantity}: exponent {fit.exponent.value:.2f}"
    return series.quantity
