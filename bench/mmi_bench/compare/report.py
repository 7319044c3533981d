"""Tables of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.compare.backends import COMPILED, LABELS, PYTORCH, RUNTIME
from mmi_bench.compare.compare import Comparison
from mmi_bench.statistics import Statistics

# Minimum speedup by measure: of any model, and of the released reading by name of the model.
_GOALS = {"whole document": 5.0}
_GOALS_OF_MODEL = {
    "released_small": {
        "whole turn": 15.0,
        "time to first token": 2.0,
        "per token, 4 images in context": 12.0,
    },
    "released_large": {
        "whole turn": 8.0,
        "time to first token": 2.0,
        "per token, 4 images in context": 5.0,
    },
}

# Maximum time of a token that looks at eight images over that of one that looks at none.
COST_GOAL = 1.15


def print_report(console: Console, comparison: Comparison) -> None:
    """Print the medians, then the quartiles, then the comparison with the compiled U-Net; all
    tables fit 80 columns."""
    console.print(table(comparison))
    console.print(quartiles_table(comparison))
    if COMPILED in comparison.backends:
        console.print(compiled_table(comparison))
    about = comparison.about
    console.print(
        f"{about['machine']['processor']}, {about['threads']} threads, float32, "
        f"{about['schedule']}, guidance {about['guidance']:g}"
        + (f", PyTorch its teacher by {about['teacher_schedule']}" if "teacher" in about else "")
        + f"; {about['repeats']} repeats in turns"
        + ("; CPU time" if about["clock"] == "cpu" else "")
    )
    for backend, reason in about["left_out"].items():
        console.print(f"not measured: {LABELS[backend]}: {reason}", highlight=False, markup=False)


def table(comparison: Comparison) -> Table:
    """Build the table of medians: the runtime, PyTorch as published, their ratio, and the goal."""
    columns = _table(
        f"{comparison.about['model']}: ONNX Runtime against PyTorch as published, medians",
        ("", "runtime", "PyTorch", "ratio", "goal"),
    )
    goals = _GOALS_OF_MODEL.get(comparison.about["model"], _GOALS)
    for metric in comparison.metrics():
        ratio, goal = metric.speedup().median, goals.get(metric.name)
        columns.add_row(
            f"{_short(metric.name)}, ms",
            _milliseconds(metric.of(RUNTIME).median),
            _milliseconds(metric.of(PYTORCH).median),
            f"{ratio:.2f}",
            _goal(f">= {goal:g}", ratio >= goal) if goal else "",
        )
    ours, theirs = (comparison.cost_of_images(backend).median for backend in _BOTH)
    columns.add_row(
        _cost_name(comparison),
        f"{ours:.2f}",
        f"{theirs:.2f}",
        "",
        _goal(f"<= {COST_GOAL:g}", ours <= COST_GOAL),
    )
    ours, theirs = (comparison.peak_bytes[backend] for backend in _BOTH)
    columns.add_row(
        "peak memory, MB",
        f"{ours / 1e6:.0f}",
        f"{theirs / 1e6:.0f}",
        f"{theirs / ours:.2f}",
        _goal("no larger", ours <= theirs),
    )
    ours, theirs = (comparison.load_seconds[backend] for backend in _BOTH)
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
        ratio = metric.speedup()
        columns.add_row(
            f"{_short(metric.name)}, ms",
            *(_quartiles(metric.of(backend)) for backend in _BOTH),
            _between(ratio.low, ratio.high),
            _between(ratio.least, ratio.greatest),
        )
    costs = (comparison.cost_of_images(backend) for backend in _BOTH)
    quartiles = (_between(one.low, one.high) for one in costs)
    columns.add_row(_cost_name(comparison), *quartiles, "", "")
    return columns


def compiled_table(comparison: Comparison) -> Table:
    """Build the table of PyTorch with its own MMFS and a compiled U-Net, relative to the runtime;
    its memory is left out, as compilation takes most of it."""
    columns = _table(
        "against PyTorch with its fastest MMFS, its U-Net compiled by torch.compile",
        ("", "PyTorch", "quartiles", "ratio", "quartiles"),
    )
    for metric in comparison.metrics():
        seconds, ratio = metric.of(COMPILED), metric.speedup(COMPILED)
        columns.add_row(
            f"{_short(metric.name)}, ms",
            _milliseconds(seconds.median),
            _quartiles(seconds),
            f"{ratio.median:.2f}",
            _between(ratio.low, ratio.high),
        )
    return columns


# Backends of the first two tables.
_BOTH = (RUNTIME, PYTORCH)


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


def _quartiles(seconds: Statistics) -> str:
    return f"{_milliseconds(seconds.low)}–{_milliseconds(seconds.high)}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"


def _between(low: float, high: float) -> str:
    return "–".join(f"{x:.{1 if x >= 10 else 2}f}" for x in (low, high))


def _goal(text: str, reached: bool) -> str:
    return f"{text} {'reached' if reached else 'missed'}"
