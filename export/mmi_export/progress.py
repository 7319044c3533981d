"""What an export is doing: told while it works, with time and memory, and kept for its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mmi_deploy.system.process_memory import memory_bytes, peak_bytes

Progress = Callable[[str, int, int], None]
"""Called with what is done next, how much is done and how much there is."""

GIGABYTE = 10**9


@dataclass(frozen=True)
class Stage:
    """What was done, for how long, and the most memory that the process had held by its end."""

    what: str
    seconds: float
    peak_bytes: int


@dataclass
class Watch:
    """Times the stages of an export of `graphs` graphs."""

    tell: Progress
    graphs: int
    stages: list[Stage] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _now: tuple[str, float] | None = None
    _index: int = 0
    _said: str = ""

    @property
    def total(self) -> int:
        """Stages to tell of: each graph is exported and proved."""
        return 2 * self.graphs

    def graph(self, doing: str, name: str, index: int, step: int) -> None:
        """`doing` (exporting, proving) graph number `index`; `step`: 0 exporting, 1 proving."""
        self.begin(f"{doing} {name}", 2 * index + step, f"graph {index + 1} of {self.graphs}, ")

    def begin(self, what: str, done: int, where: str = "") -> None:
        """The stage before is over; `what` begins."""
        self.end()
        self._now = (what, time.monotonic())
        self._index = done
        elapsed = time.monotonic() - self._began
        memory = f"{memory_bytes() / GIGABYTE:.1f} GB of memory"
        self.tell(f"{what} ({where}{elapsed:.0f} s, {memory})", done, self.total)

    def more(self, what: str) -> None:
        """A word about a stage that takes long."""
        elapsed = time.monotonic() - self._began
        self.tell(f"{what} ({elapsed:.0f} s)", self._index, self.total)

    def more_every(self, what: str, done: int, of: int) -> None:
        """`more` with how many gigabytes are done, once for each."""
        words = f"{what}: {done} of {of} GB"
        if done and words != self._said:
            self._said = words
            self.more(words)

    def end(self) -> None:
        """The last stage is over."""
        if self._now is not None:
            what, began = self._now
            self.stages.append(Stage(what, time.monotonic() - began, peak_bytes()))
            self._now = None
