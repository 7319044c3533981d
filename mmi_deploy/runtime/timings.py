"""Latency of the stages of a generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# encode: images to visual tokens and the MMFS values of the LLM. prefill: several tokens at once.
# decode: one token. values (the MMFS values of the U-Net), condition, denoise (a step) and vae: the
# parts of drawing a picture.
STAGES = ("encode", "prefill", "decode", "values", "condition", "denoise", "vae")


@dataclass(frozen=True)
class Timing:
    """One run of a stage. count: its tokens, images or steps."""

    stage: str
    seconds: float
    count: int


@dataclass
class Timings:
    """Timings of all runs, in order."""

    runs: list[Timing] = field(default_factory=list)

    @contextmanager
    def measure(self, stage: str, count: int = 1) -> Iterator[None]:
        """Time the block as one run of `stage`, unless it raises."""
        start = time.perf_counter()
        yield
        self.runs.append(Timing(stage, time.perf_counter() - start, count))

    def seconds(self, stage: str) -> list[float]:
        """Latency in seconds of every run of `stage`."""
        return [run.seconds for run in self.runs if run.stage == stage]

    def totals(self) -> dict[str, tuple[float, int]]:
        """Total (seconds, count) of each stage that ran, in the order of `STAGES`."""
        found = {}
        for stage in STAGES:
            runs = [run for run in self.runs if run.stage == stage]
            if runs:
                found[stage] = (sum(run.seconds for run in runs), sum(run.count for run in runs))
        return found
