"""Roofline plot of graphs and GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_deploy.system.files import prepare_file
from mmi_deploy.system.plots import plotted

if TYPE_CHECKING:
    from mmi_deploy.analysis.cost import GraphCost
    from mmi_deploy.analysis.gpu_specs import Gpu

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_MARKERS = "osD^vPX*"


def draw_roofline(costs: Sequence[GraphCost], gpus: Sequence[Gpu], path: Path) -> None:
    """Write a roofline plot to `path`, as `.svg` or `.png`. Raises `MmiError` without matplotlib or
    for another suffix."""
    prepare_file(path, ".svg", ".png")
    with plotted(path, 10, 4.2) as figure:
        roof, times = figure.subplots(1, 2)
        _roofs(roof, costs, gpus)
        _times(times, costs, gpus)


def _roofs(axes: Any, costs: Sequence[GraphCost], gpus: Sequence[Gpu]) -> None:
    """Plot attainable FLOP/s over arithmetic intensity: a roof per GPU, and each graph at its own
    intensity."""
    intensities = [cost.total.matrix / max(cost.floor_bytes, 1) for cost in costs]
    left, right = min(intensities) / 3, max(*intensities, 1000.0) * 3
    for gpu, colour in zip(gpus, _COLOURS, strict=False):
        peak = gpu.peak(costs[0].compute)
        knee = peak / gpu.bandwidth
        xs = sorted({left, knee, right})
        ys = [min(x * gpu.bandwidth, peak) / 1e12 for x in xs]
        axes.plot(xs, ys, color=colour, linewidth=1.2, label=gpu.title)
    for cost, intensity, marker in zip(costs, intensities, cycle(_MARKERS), strict=False):
        ys = [min(intensity * gpu.bandwidth, gpu.peak(cost.compute)) / 1e12 for gpu in gpus]
        xs = [intensity] * len(ys)
        axes.plot(xs, ys, linestyle="none", marker=marker, color="black", label=cost.graph)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("matrix FLOPs per byte of the floor")
    axes.set_ylabel("attainable TFLOP/s")
    axes.set_title("Roofline")
    axes.legend(frameon=False, fontsize=7)


def _times(axes: Any, costs: Sequence[GraphCost], gpus: Sequence[Gpu]) -> None:
    """Plot the roofline time of each graph, and its time without fusion."""
    height = 0.8 / len(gpus)
    for number, (gpu, colour) in enumerate(zip(gpus, _COLOURS, strict=False)):
        places = [row + number * height for row in range(len(costs))]
        fused = [1000 * cost.seconds(gpu) for cost in costs]
        unfused = [1000 * cost.seconds_unfused(gpu) for cost in costs]
        axes.barh(places, unfused, height, color=colour, alpha=0.3)
        axes.barh(places, fused, height, color=colour)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(costs))])
    axes.set_yticklabels([cost.graph for cost in costs])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("computed lower bound, ms (pale: without fusion)")
    axes.set_title(f"One run, {costs[0].storage}; colours as on the left")
