"""A comparison as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from mmi_bench.compare.compare import Comparison
from mmi_bench.statistics import Spread

GOALS = {"whole document": 5.0}
COST_GOAL = 1.15
"""What is aimed at: the speedup of a whole document; the time of a token that looks at eight images
over that of one that looks at none."""


def table(comparison: Comparison) -> Table:
    """One line per measure: median (quartiles) of both sides and of their ratio."""
    about = comparison.about
    machine = about["machine"]
    columns = Table(
        title=f"{about['model']}: ONNX Runtime against PyTorch as published",
        caption=f"{machine['processor']}, {about['threads']} threads, float32, "
        f"{about['schedule']}, guidance {about['guidance']:g}; median (quartiles) of "
        f"{about['repeats']} repeats in turns",
        box=box.SIMPLE_HEAD,
    )
    columns.add_column("")
    for name in ("runtime", "PyTorch", "ratio", "least - greatest", "goal"):
        columns.add_column(name, justify="right")
    for row in _rows(comparison):
        columns.add_row(*row)
    return columns


def _rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    for metric in comparison.metrics():
        ratio, goal = metric.speedup, GOALS.get(metric.name)
        yield (
            metric.name,
            _milliseconds(Spread.of(metric.runtime)),
            _milliseconds(Spread.of(metric.pytorch)),
            f"{ratio.median:.2f}x ({ratio.low:.2f} - {ratio.high:.2f})",
            f"{ratio.least:.2f} - {ratio.greatest:.2f}",
            _goal(f">= {goal:g}x", ratio.median >= goal) if goal else "",
        )
    most, least = max(comparison.image_counts), min(comparison.image_counts)
    ours, theirs = (comparison.cost_of_images(side) for side in ("runtime", "pytorch"))
    yield (
        f"a token with {most} images over one with {least}",
        f"{ours.median:.2f} ({ours.low:.2f} - {ours.high:.2f})",
        f"{theirs.median:.2f} ({theirs.low:.2f} - {theirs.high:.2f})",
        "",
        "",
        _goal(f"<= {COST_GOAL:g}", ours.median <= COST_GOAL),
    )
    peaks = comparison.peak_bytes
    yield (
        "peak memory",
        _megabytes(peaks["runtime"]),
        _megabytes(peaks["pytorch"]),
        f"{peaks['pytorch'] / peaks['runtime']:.2f}x",
        "",
        _goal("no larger", peaks["runtime"] <= peaks["pytorch"]),
    )
    load = comparison.load_seconds
    yield (
        "loading",
        f"{load['runtime']:.2f} s",
        f"{load['pytorch']:.2f} s",
        f"{load['pytorch'] / load['runtime']:.2f}x",
        "",
        "",
    )


def _milliseconds(spread: Spread) -> str:
    digits = 0 if spread.median >= 1 else 2
    median, low, high = (f"{1000 * x:.{digits}f}" for x in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low} - {high})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _goal(text: str, reached: bool) -> str:
    return f"{text} {'reached' if reached else 'missed'}"
