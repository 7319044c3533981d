"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.compare.backends import BACKENDS
from mmi_bench.compare.compare import Comparison
from mmi_bench.statistics import Statistics

# Minimum speedup by measure.
GOALS = {"whole document": 5.0}

# Maximum time of a token that looks at eight images over that of one that looks at none.
COST_GOAL = 1.15


def print_report(console: Console, comparison: Comparison) -> None:
    """Print the medians, then the quartiles; both tables fit 80 columns."""
    console.print(table(comparison))
    console.print(quartiles_table(comparison))
    about = comparison.about
    console.print(
        f"{about['machine']['processor']}, {about['threads']} threads, float32, "
        f"{about['schedule']}, guidance {about['guidance']:g}; {about['repeats']} repeats in turns"
    )


def table(comparison: Comparison) -> Table:
    """Build the table of medians: both backends, their ratio, and the goal."""
    columns = _table(
        f"{comparison.about['model']}: ONNX Runtime against PyTorch as published, medians",
        ("", "runtime", "PyTorch", "ratio", "goal"),
    )
    for metric in comparison.metrics():
        ratio, goal = metric.speedup.median, GOALS.get(metric.name)
        columns.add_row(
            f"{_short(metric.name)}, ms",
            _milliseconds(Statistics.of(metric.runtime).median),
            _milliseconds(Statistics.of(metric.pytorch).median),
            f"{ratio:.2f}",
            _goal(f">= {goal:g}", ratio >= goal) if goal else "",
        )
    ours, theirs = (comparison.cost_of_images(backend).median for backend in BACKENDS)
    columns.add_row(
        _cost_name(comparison),
        f"{ours:.2f}",
        f"{theirs:.2f}",
        "",
        _goal(f"<= {COST_GOAL:g}", ours <= COST_GOAL),
    )
    ours, theirs = (comparison.peak_bytes[backend] for backend in BACKENDS)
    columns.add_row(
        "peak memory, MB",
        f"{ours / 1e6:.0f}",
        f"{theirs / 1e6:.0f}",
        f"{theirs / ours:.2f}",
        _goal("no larger", ours <= theirs),
    )
    ours, theirs = (comparison.load_seconds[backend] for backend in BACKENDS)
    loading = (f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    columns.add_row("loading once, s", *loading, "")
    return columns


def quartiles_table(comparison: Comparison) -> Table:
    """Build the table of quartiles, with the minimum and maximum ratio."""
    columns = _table(
        "quartiles, and the range of the ratio",
        ("", "runtime", "PyTorch", "ratio", "range"),
    )
    for metric in comparison.metrics():
        both = (Statistics.of(seconds) for seconds in (metric.runtime, metric.pytorch))
        columns.add_row(
            f"{_short(metric.name)}, ms",
            *(f"{_milliseconds(one.low)}–{_milliseconds(one.high)}" for one in both),
            _between(metric.speedup.low, metric.speedup.high),
            _between(metric.speedup.least, metric.speedup.greatest),
        )
    costs = (comparison.cost_of_images(backend) for backend in BACKENDS)
    quartiles = (_between(one.low, one.high) for one in costs)
    columns.add_row(_cost_name(comparison), *quartiles, "", "")
    return columns


def _table(title: str, headings: Sequence[str]) -> Table:
    columns = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        columns.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return columns


def _cost_name(comparison: Comparison) -> str:
    most, least = max(comparison.image_counts), min(comparison.image_counts)
    return f"{most} images over {least or 'none'}"


def _short(name: str) -> str:
    """Shorten a measure's name by words that its row implies."""
    for words in ("the same ", "time to ", " in context"):
        name = name.replace(words, "")
    return name


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def _between(low: float, high: float) -> str:
    return "–".join(f"{x:.{1 if x >= 10 else 2}f}" for x in (low, high))


def _goal(text: str, reached: bool) -> str:
    return f"{text} {'reached' if reached else 'missed'}"
