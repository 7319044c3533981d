"""Gains of the runs themselves, and the bound for whole documents that follows from them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from mmi_bench.batch.sample import Sample
from mmi_deploy.batching.executor import Executor
from mmi_deploy.batching.run_times import RunTimes
from mmi_deploy.batching.warm_up import warm_up
from mmi_deploy.runtime.runtime import Runtime

# Stages whose runs take a row of each of several documents. The others take one document.
BATCHED = ("encode", "decode", "values", "denoise", "vae")


class RunBench:
    """Run times of the engines by number of rows, without documents."""

    def __init__(self, runtime: Runtime, most: int, cpu_time: bool = False) -> None:
        """most: rows of the largest run. cpu_time: of the process, in place of wall time."""
        self._executor = Executor(runtime, most, most)
        self._clock = time.process_time if cpu_time else time.perf_counter
        self._rounds: list[RunTimes] = []

    def measure(self) -> None:
        """Measure a round: every run at 1, 2, 4, ... rows."""
        times = RunTimes()
        warm_up(self._executor, times, self._clock)
        self._rounds.append(times)

    def seconds(self, stage: str, rows: int) -> float:
        """Median seconds of a run."""
        return median(times.expected(stage, rows) for times in self._rounds)

    def gain(self, stage: str, rows: int) -> float:
        """Rows per second of a run of `rows` rows over those of a run of one: median of rounds."""
        if stage not in BATCHED:
            return 1.0
        return median(
            rows * times.expected(stage, 1) / times.expected(stage, rows) for times in self._rounds
        )


def shares(singles: Iterable[Sample]) -> dict[str, float]:
    """Share of each stage in the time of documents one after another; `python` for the rest."""
    spent: dict[str, float] = {}
    whole = 0.0
    for sample in singles:
        whole += sample.seconds
        for record in sample.records:
            for stage, (seconds, _) in record.stages.items():
                spent[stage] = spent.get(stage, 0.0) + seconds
    found = {stage: seconds / whole for stage, seconds in spent.items()}
    return {**found, "python": max(1 - sum(found.values()), 0.0)}


def bound(share: Mapping[str, float], gains: Mapping[str, float]) -> float:
    """Speed-up if every stage gains what its runs gain, and the rest nothing."""
    return 1 / sum(part / gains.get(stage, 1.0) for stage, part in share.items())


def gains_of(bench: RunBench, stages: Sequence[str], rows: int) -> dict[str, float]:
    """Gain of each stage at `rows` rows."""
    return {stage: bench.gain(stage, rows) for stage in stages}
