"""Progress of long work: one protocol, a progress bar in a terminal, sparse lines in a log.

Functions that take long have a parameter `progress: Progress = silent` and call it while they run;
commands pass the `Progress` that `shown` yields.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from mmi_deploy.system.process_memory import memory_bytes, peak_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

Unit = Literal["steps", "bytes"]

# Seconds between two log lines about the same stage: initial and largest interval.
FIRST_INTERVAL, LAST_INTERVAL = 5.0, 60.0

# Interval as a fraction of the elapsed time, so that hours of work do not flood the log.
_INTERVAL_GROWTH = 1 / 20


_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Progress(Protocol):
    """Callback for the beginning of a stage, and any number of times while the stage lasts."""

    def __call__(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        """Report that the stage `what` is running.

        `done` of `total` steps or bytes are finished; total 0: unknown. `detail`: text that changes
        from call to call, such as a loss. May raise `Cancelled`.
        """


class Cancelled(Exception):
    """Raised by a `Progress` to stop the work: its result is not wanted any more."""


def silent(
    what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
) -> None:
    """Discard progress: the default of every `progress` parameter."""


@contextmanager
def shown(
    console: Console, first: str | None = None, *, patience: float = 0.0
) -> Iterator[Progress]:
    """Show progress on `console`: a bar if it is a terminal, otherwise the lines of `LogLines`.

    `first`: stage before the first call; None: the log has no line for it. `patience`: seconds
    before the first log line, for work that is usually done sooner.
    """
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(first or "starting", total=None, count="", detail="")

            def update(
                what: str,
                done: int = 0,
                total: int = 0,
                *,
                detail: str = "",
                unit: Unit = "steps",
            ) -> None:
                bar.update(
                    task,
                    description=what,
                    completed=done,
                    total=total or None,
                    count=count_of(done, total, unit),
                    detail=detail,
                )

            yield update
        return
    lines = LogLines(console.print, patience=patience)
    if first is not None:
        lines(first)
    yield lines


def _bar(console: Console) -> Bar:
    """A progress bar that is erased when the work is done."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console,
        transient=True,
    )


def count_of(done: int, total: int, unit: Unit) -> str:
    """`3 of 14 done`, `1.2 of 30.0 GB`; empty if the total is unknown."""
    if not total:
        return ""
    if unit == "steps":
        return f"{done} of {total} done"
    scale, name = next((one for one in _BYTES if total >= one[0]), _BYTES[-1])
    return f"{done / scale:.1f} of {total / scale:.1f} {name}"


@dataclass
class LogLines:
    """Log lines: one when a stage begins, then one per interval, which grows with elapsed time."""

    print: Callable[[str], object]
    patience: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _stage: str | None = None
    _stage_began: float = 0.0
    _stage_done: int = 0
    _printed: float = 0.0

    def __post_init__(self) -> None:
        self._began = self.clock()

    def __call__(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        now = self.clock()
        passed = now - self._began
        if fresh := what != self._stage:
            self._stage, self._stage_began, self._stage_done = what, now, done
        if passed < self.patience:
            return
        interval = min(max(FIRST_INTERVAL, passed * _INTERVAL_GROWTH), LAST_INTERVAL)
        if not fresh and now - self._printed < interval:
            return
        self._printed = now
        facts = [count_of(done, total, unit), f"{passed:.0f} s" if passed >= 1 else ""]
        facts += [self._left(now, done, total), detail]
        said = ", ".join(filter(None, facts))
        self.print(f"{what} ({said})" if said else what)

    def _left(self, now: float, done: int, total: int) -> str:
        """Estimated remaining time of this stage at its average speed; empty if not yet known."""
        spent, finished = now - self._stage_began, done - self._stage_done
        if spent < FIRST_INTERVAL or finished <= 0 or done >= total:
            return ""
        return f"about {duration(spent / finished * (total - done))} left"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Stage:
    """A finished stage: name, seconds, and the peak memory of the process at its end."""

    what: str
    seconds: float
    peak_bytes: int


@dataclass
class StageTimer:
    """Reports the stages of a job to `progress` and records their times and peak memory.

    `total`: number of stages.
    """

    progress: Progress
    total: int
    stages: list[Stage] = field(default_factory=list)
    _current: tuple[str, float] | None = None
    _done: int = 0
    _detail: str = ""

    def begin(self, what: str, done: int, detail: str = "") -> None:
        """End the current stage and begin stage `what`, after `done` of `total`."""
        self.end()
        self._current, self._done, self._detail = (what, time.monotonic()), done, detail
        self.progress(what, done, self.total, detail=self._facts())

    def within(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        """A `Progress` for parts of the current stage, reported as the stage's detail."""
        stage = self._current[0] if self._current else what
        part = " ".join(filter(None, ["" if what == stage else what, count_of(done, total, unit)]))
        facts = ", ".join(filter(None, [self._facts(), part, detail]))
        self.progress(stage, self._done, self.total, detail=facts)

    def end(self) -> None:
        """End the current stage."""
        if self._current is not None:
            what, began = self._current
            self.stages.append(Stage(what, time.monotonic() - began, peak_bytes()))
            self._current = None

    def _facts(self) -> str:
        return ", ".join(filter(None, [self._detail, f"{memory_bytes() / 1e9:.1f} GB of memory"]))
