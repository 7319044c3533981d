"""Table of the scale benchmark."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from mmi_bench.scale.cases import LABELS, MEMORY, ROWS, UNITS
from mmi_bench.scale.expectations import LINEAR, MISSED, UNDECIDED
from mmi_bench.scale.fit import Estimate
from mmi_bench.scale.measure import ScaleResult, Series
from mmi_deploy.cli.console import counted, duration, print_table
from mmi_deploy.system.files import size


def print_report(console: Console, result: ScaleResult) -> None:
    """Print the table and the reasons of what was missed."""
    about = result.about
    print_table(console, table(result))
    for one in result.series:
        if one.verdict in (MISSED, UNDECIDED) and (expected := one.expectation):
            console.print(
                f"{one.verdict}: {one.quantity} by {one.axis}: expected {expected.said()} "
                f"({expected.why}), got {grown(one)}"
            )
    console.print(
        "Exponents are those of the larger half of the points; intervals: 95 %, over rounds. "
        f"Documents with images have {about['context']} tokens; {about['clock']} time; memory: "
        f"{about['memory']}"
    )
    kernels = f", kernels: {about['kernels']}" if "kernels" in about else ""
    if "machine" in about:
        console.print(
            f"{about['model']}; {about['machine']['processor']}, "
            f"{counted(about['threads'], 'thread')}, {about['target']}{kernels}; "
            f"{about['schedule']}; {about['rounds']} rounds; load before: "
            f"{about['machine']['load_before']:.1f}"
        )


def table(result: ScaleResult) -> Table:
    """Table with a line for each series."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        title="Growth of time and memory, medians",
        title_justify="left",
    )
    for heading in ("by", "of"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("from", "to", "grows", "fixed part", "expected", ""):
        right = heading not in ("expected", "")
        shown.add_column(heading, justify="right" if right else "left", no_wrap=True)
    axis = ""
    for one in result.series:
        if axis and one.axis != axis:
            shown.add_section()
        middle, expected = one.medians, one.expectation
        shown.add_row(
            LABELS[one.axis] if one.axis != axis else "",
            named(one),
            *(f"{one.points[end]}: {amount(one, middle[end])}" for end in (0, -1)),
            grown(one),
            amount(one, one.fit.fixed) if one.fit.fixed > 0 else "none",
            expected.said() if expected else "",
            one.verdict or "",
        )
        axis = one.axis
    return shown


def named(series: Series) -> str:
    """Name of the quantity; with rows, a run of the stage."""
    run = series.axis == ROWS and series.quantity != MEMORY
    return f"a run of {series.quantity}" if run else series.quantity


def amount(series: Series, value: float) -> str:
    """A time or a size of memory."""
    return size(round(value)) if series.quantity == MEMORY else duration(value)


def grown(series: Series) -> str:
    """Growth in the terms of the expectation: an exponent, or percent by a unit of the axis."""
    fit, (count, unit) = series.fit, UNITS[series.axis]
    expected = series.expectation
    linear = expected.kind == LINEAR if expected else fit.growth is None
    if linear or fit.growth is None:
        return f"x^{interval(fit.exponent)}" if fit.exponent else "all of it"
    return f"{interval(fit.growth, 100.0 * count)} % per {unit}"


def interval(found: Estimate, scale: float = 1.0) -> str:
    """A number with its interval."""
    value, low, high = (f"{scale * one:.2f}" for one in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"
