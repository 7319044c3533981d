"""Where commands print: results to stdout, progress and remarks to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

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
    """For people who watch; silent about progress when stderr is no terminal."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def progress(console: Console, count: ProgressColumn | None = None) -> Progress:
    """A bar that goes when it is done. `count`: how it says how much is done."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        count or MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def staged(first: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows work that has stages: a bar in a terminal, a line for each stage in a log.

    Gives a function to call with (what is done next, how much is done, how much there is).
    """
    console = remarks()
    if not console.is_terminal:
        yield lambda what, done, total: console.print(f"{what} ({done} of {total} done)")
        return
    with progress(console) as bar:
        task = bar.add_task(first, total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def print_json(value: Any) -> None:
    """One JSON value on stdout, for programs."""
    json.dump(value, sys.stdout, indent=2)  # ASCII: whole in whatever encoding stdout has
    sys.stdout.write("\n")


def counted(count: int, noun: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
