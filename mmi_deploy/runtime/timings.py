"""Latency of the stages of a generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mmi_deploy.runtime.buffers import HOST, Mark, Memory
from mmi_deploy.system.nvtx import profiler_range

# encode: images to visual tokens and the MMFS values of the LLM. prefill: several tokens at once.
# decode: one token. values (the MMFS values of the U-Net), condition, denoise (a step) and vae: the
# parts of drawing a picture.
STAGES = ("encode", "prefill", "decode", "values", "condition", "denoise", "vae")


# Runs whose marks are not read yet. Older ones are done, so that reading them does not wait.
_MOST_MARKED = 4


@dataclass(frozen=True)
class Timing:
    """One run of a stage. count: its tokens, images or steps."""

    stage: str
    seconds: float
    count: int


class Timings:
    """Timings of all runs, in order.

    A run on a device is timed between two marks of its stream, which are read later, so that
    nothing waits for a timing.
    """

    def __init__(self, runs: Iterable[Timing] = ()) -> None:
        self._runs = list(runs)
        self._marked: deque[tuple[str, int, Mark, Mark]] = deque()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timings) and self.runs == other.runs

    def __repr__(self) -> str:
        return f"Timings({self.runs})"

    @property
    def runs(self) -> list[Timing]:
        """Timings of all runs. Waits for the last one on a device."""
        self._read_marks(0)
        return self._runs

    @contextmanager
    def measure(self, stage: str, count: int = 1, memory: Memory = HOST) -> Iterator[None]:
        """Time the block as one run of `stage` whose work is enqueued on `memory`, unless it
        raises."""
        start = memory.mark()
        with profiler_range(stage):
            yield
        self._marked.append((stage, count, start, memory.mark()))
        self._read_marks(_MOST_MARKED)

    def _read_marks(self, kept: int) -> None:
        """Read all marks but the last `kept` runs'."""
        while len(self._marked) > kept:
            stage, count, start, end = self._marked.popleft()
            self._runs.append(Timing(stage, end.seconds_since(start), count))

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
