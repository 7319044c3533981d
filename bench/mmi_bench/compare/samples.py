"""Latencies of one run of a case, as a user of the runtime sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    TextDelta,
)

# `wall`: latency. `cpu`: CPU time of the process, all of its threads together.
ClockName = Literal["wall", "cpu"]
CLOCKS: Mapping[ClockName, Callable[[], float]] = {
    "wall": lambda: time.perf_counter(),
    "cpu": lambda: time.process_time(),
}


@dataclass(frozen=True)
class Sample:
    """Latencies in seconds. `token_gaps`: from one token of a turn to the next. `step_gaps`: from
    one denoising step of a picture to the next. `stages`: the backend's own timings, by stage."""

    seconds: float
    first_token: float
    token_gaps: list[float]
    step_gaps: list[float]
    stages: dict[str, list[float]]

    @property
    def per_token(self) -> float:
        return sum(self.token_gaps) / len(self.token_gaps)

    @property
    def per_step(self) -> float:
        return sum(self.step_gaps) / len(self.step_gaps)

    def stage(self, name: str) -> float:
        """Seconds of all runs of a stage."""
        return sum(self.stages[name])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Output:
    """Text and pictures of a run, for the comparison of both backends."""

    text: str = ""
    pictures: list[Rgb] = field(default_factory=list)


def take(events: Iterator[Event], clock: ClockName = "wall") -> tuple[Sample, Output]:
    """Run a generation to its end and time its events. `events` must not have been started.
    `stages` are wall time whatever the clock."""
    read = CLOCKS[clock]
    start = read()
    output = Output()
    first, before = 0.0, None
    token_gaps, step_gaps = [], []
    stages: dict[str, list[float]] = {}
    last = start
    for event in events:
        now = read()
        if isinstance(event, TextDelta):
            output.text += event.text
            first = first or now - start
            if before is TextDelta:
                token_gaps.append(now - last)
        elif isinstance(event, ImageProgress) and before is ImageProgress:
            step_gaps.append(now - last)
        elif isinstance(event, ImageDone):
            output.pictures.append(event.rgb)
        elif isinstance(event, Finished):
            for run in event.timings.runs:
                stages.setdefault(run.stage, []).append(run.seconds)
        last, before = now, type(event)
    return Sample(last - start, first, token_gaps, step_gaps, stages), output
