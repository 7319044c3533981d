"""How long each stage of a generation took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("encode", "prefill", "decode", "condition", "denoise", "vae")
"""encode: an image to values. prefill: several tokens at once. decode: one token. condition,
denoise (one step) and vae: the parts of a drawn picture."""


@dataclass(frozen=True)
class Timing:
    """One run of a stage: seconds, and the tokens, images or steps that it dealt with."""

    stage: str
    seconds: float
    count: int


@dataclass
class Timings:
    """All runs, in order."""

    runs: list[Timing] = field(default_factory=list)

    @contextmanager
    def measure(self, stage: str, count: int = 1) -> Iterator[None]:
        """Time the block as one run of `stage`; a block that raises is not recorded."""
        start = time.perf_counter()
        yield
        self.runs.append(Timing(stage, time.perf_counter() - start, count))

    def seconds(self, stage: str) -> list[float]:
        """Seconds of every run of `stage`."""
        return [run.seconds for run in self.runs if run.stage == stage]

    def totals(self) -> dict[str, tuple[float, int]]:
        """(seconds, count) of each stage that ran, in the order of `STAGES`."""
        found = {}
        for stage in STAGES:
            runs = [run for run in self.runs if run.stage == stage]
            if runs:
                found[stage] = (sum(run.seconds for run in runs), sum(run.count for run in runs))
        return found
