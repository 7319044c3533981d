"""Where commands print: results to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console

MOST_THREADS = 8 * (os.cpu_count() or 1)
"""More make everything slower, and many more never begin."""


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
