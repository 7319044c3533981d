"""Progress of long work: one protocol, a bar in a terminal, sparse lines in a log.

Whatever takes long has a parameter `progress: Progress = silent` and calls it as it goes; the
commands pass what `shown` gives.
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

FIRST_INTERVAL, LAST_INTERVAL = 5.0, 60.0
"""Seconds between two lines of a log about the same stage: at first, and at most."""

_INTERVAL_GROWTH = 1 / 20
"""The interval as a part of the time that has passed, so that hours of work make no flood."""


_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Progress(Protocol):
    """Called when a stage begins and as often as it likes while the stage lasts."""

    def __call__(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        """Tell that `what` is being done now.

        `done` of `total` steps or bytes are finished; total 0: nobody knows how many there are.
        `detail`: what changes from call to call, such as a loss. May raise `Cancelled`.
        """


class Cancelled(Exception):
    """Raised by a `Progress` whose work is to stop: nobody waits for it any more."""


def silent(
    what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
) -> None:
    """Progress that nobody watches."""


@contextmanager
def shown(
    console: Console, first: str | None = None, *, patience: float = 0.0
) -> Iterator[Progress]:
    """Show progress on `console`: a bar where it is a terminal, else lines, as `LogLines` does.

    `first` names what is done before the first call; None: a log says nothing of it. `patience`:
    seconds in which a log stays silent, for work that is mostly done sooner.
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
    """A bar that goes when it is done."""
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
    """`3 of 14 done`, `1.2 of 30.0 GB`; empty where the total is not known."""
    if not total:
        return ""
    if unit == "steps":
        return f"{done} of {total} done"
    scale, name = next((one for one in _BYTES if total >= one[0]), _BYTES[-1])
    return f"{done / scale:.1f} of {total / scale:.1f} {name}"


@dataclass
class LogLines:
    """A line when a stage begins; while it lasts, one every few seconds, and ever fewer."""

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
        """The rest of this stage at its pace so far."""
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
    """A finished stage of work, its seconds, and the peak memory of the process by its end."""

    what: str
    seconds: float
    peak_bytes: int


@dataclass
class StageTimer:
    """Tells of the stages of a piece of work, and keeps their times and memory for its report.

    `total`: stages that there will be.
    """

    progress: Progress
    total: int
    stages: list[Stage] = field(default_factory=list)
    _current: tuple[str, float] | None = None
    _done: int = 0
    _detail: str = ""

    def begin(self, what: str, done: int, detail: str = "") -> None:
        """The stage before is over; `what` begins, after `done` of `total`."""
        self.end()
        self._current, self._done, self._detail = (what, time.monotonic()), done, detail
        self.progress(what, done, self.total, detail=self._facts())

    def within(
        self, what: str, done: int = 0, total: int = 0, *, detail: str = "", unit: Unit = "steps"
    ) -> None:
        """A `Progress` for the parts of the stage that runs: told as the stage's detail."""
        stage = self._current[0] if self._current else what
        part = " ".join(filter(None, ["" if what == stage else what, count_of(done, total, unit)]))
        facts = ", ".join(filter(None, [self._facts(), part, detail]))
        self.progress(stage, self._done, self.total, detail=facts)

    def end(self) -> None:
        """The last stage is over."""
        if self._current is not None:
            what, began = self._current
            self.stages.append(Stage(what, time.monotonic() - began, peak_bytes()))
            self._current = None

    def _facts(self) -> str:
        return ", ".join(filter(None, [self._detail, f"{memory_bytes() / 1e9:.1f} GB of memory"]))
