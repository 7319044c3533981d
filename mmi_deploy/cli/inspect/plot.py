"""Graphs in the roofline of a card, as a picture: which are held back by memory, which by FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import prepare_file

if TYPE_CHECKING:
    from mmi_deploy.analysis.cost import GraphCost
    from mmi_deploy.analysis.gpu_specs import Card

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
_MARKERS = "osD^vPX"


def draw_roofline(costs: Sequence[GraphCost], cards: Sequence[Card], path: Path) -> None:
    """Write `path`, whose ending (`.svg`, `.png`) is its format; raises `MmiError` without
    matplotlib or for another ending."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MmiError(
            "plots need matplotlib, which is not installed", fix="pip install matplotlib"
        ) from None
    prepare_file(path, ".svg", ".png")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    roof, times = figure.subplots(1, 2)
    _roofs(roof, costs, cards)
    _times(times, costs, cards)
    figure.savefig(path, dpi=150)


def _roofs(axes: Any, costs: Sequence[GraphCost], cards: Sequence[Card]) -> None:
    """FLOPs per byte across, FLOP/s up: a graph stands below the roof of each card at its own
    intensity, at the most that the card can do for it."""
    intensities = [cost.total.matrix / max(cost.floor_bytes, 1) for cost in costs]
    left, right = min(intensities) / 3, max(*intensities, 1000.0) * 3
    for card, colour in zip(cards, _COLOURS, strict=False):
        peak = card.peak(costs[0].compute)
        knee = peak / card.bandwidth
        xs = sorted({left, knee, right})
        ys = [min(x * card.bandwidth, peak) / 1e12 for x in xs]
        axes.plot(xs, ys, color=colour, linewidth=1.2, label=card.title)
    for cost, intensity, marker in zip(costs, intensities, _MARKERS, strict=False):
        ys = [min(intensity * card.bandwidth, card.peak(cost.compute)) / 1e12 for card in cards]
        xs = [intensity] * len(ys)
        axes.plot(xs, ys, linestyle="none", marker=marker, color="black", label=cost.graph)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("matrix FLOPs per byte that must move")
    axes.set_ylabel("TFLOP/s that the card can reach")
    axes.set_title("Roofline")
    axes.legend(frameon=False, fontsize=7)


def _times(axes: Any, costs: Sequence[GraphCost], cards: Sequence[Card]) -> None:
    """The least time of each graph, and that of a runtime that fuses nothing."""
    height = 0.8 / len(cards)
    for number, (card, colour) in enumerate(zip(cards, _COLOURS, strict=False)):
        places = [row + number * height for row in range(len(costs))]
        fused = [1000 * cost.seconds(card) for cost in costs]
        unfused = [1000 * cost.seconds_unfused(card) for cost in costs]
        axes.barh(places, unfused, height, color=colour, alpha=0.3)
        axes.barh(places, fused, height, color=colour)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(costs))])
    axes.set_yticklabels([cost.graph for cost in costs])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds at least (pale: nothing fused), computed")
    axes.set_title(f"One run, {costs[0].storage}; colours as on the left")
