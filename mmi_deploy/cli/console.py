"""Output of commands: results on stdout, progress and remarks on stderr; formatting of numbers."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

# Upper bound of --threads: more are slower, and far more cannot be started.
MOST_THREADS = 8 * (os.cpu_count() or 1)


class _Pipe(Console):
    """Console that survives a closed pipe: `mmi generate ... | head` still writes its folder."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def results() -> Console:
    """Console for results on stdout. Piped output is neither wrapped nor coloured; brackets and
    colons in texts and file names are not interpreted as markup or emoji."""
    return _Pipe(markup=False, emoji=False, highlight=False, soft_wrap=True)


def remarks() -> Console:
    """Console for remarks and progress on stderr."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    json.dump(value, sys.stdout, indent=2)  # ASCII: whole in whatever encoding stdout has
    sys.stdout.write("\n")


def counted(count: int, noun: str) -> str:
    """Format a count: `1 picture`, `2 pictures`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_table(out: Console, table: Table) -> None:
    """Print a table at its full width unless `out` is a terminal."""
    if not out.is_terminal:
        wide = table.__rich_measure__(out, out.options.update(max_width=1000)).maximum
        out.width = max(wide, out.width)
    out.print(table)


def flops(count: int) -> str:
    """Format FLOPs: `26.2 G`."""
    value, unit = float(count), ""
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            break
        value /= 1000
    return f"{value:.0f}" if not unit else f"{_three_digits(value)} {unit}"


def duration(seconds: float) -> str:
    """Format a duration: `7.9 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def _three_digits(value: float) -> str:
    """Three significant digits, more for integers above 999; no exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
