"""Where commands print: results to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

# More make everything slower, and many more never begin.
MOST_THREADS = 8 * (os.cpu_count() or 1)


class _Pipe(Console):
    """A console whose reader may leave: `mmi generate ... | head` still writes its folder."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def results() -> Console:
    """For what was asked for; never wraps or colours what is piped on. Brackets and colons in texts
    and names of files are neither markup nor emoji."""
    return _Pipe(markup=False, emoji=False, highlight=False, soft_wrap=True)


def remarks() -> Console:
    """For people who watch, and for logs: what is said beside the results, and progress."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON value on stdout, for programs."""
    json.dump(value, sys.stdout, indent=2)  # ASCII: whole in whatever encoding stdout has
    sys.stdout.write("\n")


def counted(count: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_table(out: Console, table: Table) -> None:
    """Whole, where nobody's terminal limits it."""
    if not out.is_terminal:
        wide = table.__rich_measure__(out, out.options.update(max_width=1000)).maximum
        out.width = max(wide, out.width)
    out.print(table)


def flops(count: int) -> str:
    """FLOPs for people: `26.2 G`."""
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    return f"{value:.0f}" if not unit else f"{_three_digits(value)} {unit}"


def duration(seconds: float) -> str:
    """`7.9 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def _three_digits(value: float) -> str:
    """At least; never with an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
