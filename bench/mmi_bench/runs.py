"""Runs of one computation, timed as TensorRT's trtexec times an engine.

A run copies its inputs to the device, is enqueued, computes, and copies its outputs back, one after
the other. On the host nothing is copied, and a run is done when it returns: its latency is its
compute time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mmi_bench.statistics import Latencies
from mmi_deploy.errors import ConfigError

Clock = Callable[[], float]

# Longest warm-up and duration, in seconds: a slip of the keyboard must not run for ever.
_LONGEST = 3600.0


@dataclass(frozen=True)
class Settings:
    """Seconds of warm-up and of measurement, and the least number of measured runs. The defaults
    are those of trtexec. Raises `ConfigError` for values out of range."""

    warm_up: float = 0.2
    duration: float = 3.0
    iterations: int = 10

    def __post_init__(self) -> None:
        for option, seconds, unit, scale in (
            ("--warm-up", self.warm_up, "milliseconds", 1000.0),
            ("--duration", self.duration, "seconds", 1.0),
        ):
            if not (isfinite(seconds) and 0 < seconds <= _LONGEST):
                raise ConfigError(
                    f"{option} is out of range",
                    expected=f"more than 0 and at most {_LONGEST * scale:.0f} {unit}",
                    got=f"{seconds * scale:g}",
                )
        if self.iterations < 1:
            raise ConfigError(
                "--iterations is out of range", expected="1 or more", got=self.iterations
            )


@dataclass(frozen=True)
class Device:
    """Copies between host and device, and the end of enqueued work."""

    copy_in: Callable[[], object]
    wait: Callable[[], object]
    copy_out: Callable[[], object]


@dataclass(frozen=True)
class Computation:
    """start: computes, or with a `device` enqueues the computation there."""

    start: Callable[[], object]
    device: Device | None = None


@dataclass(frozen=True)
class Run:
    """Moments of one run, in seconds."""

    start: float
    copied_in: float
    enqueued: float
    computed: float
    end: float

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def enqueue(self) -> float:
        return self.enqueued - self.copied_in

    @property
    def host_to_device(self) -> float:
        return self.copied_in - self.start

    @property
    def compute(self) -> float:
        return self.computed - self.copied_in

    @property
    def device_to_host(self) -> float:
        return self.end - self.computed

    def to_json(self, origin: float, on_device: bool) -> dict[str, float]:
        """Milliseconds after `origin` with the keys of trtexec's `--exportTimes`. On the host a run
        is not enqueued: that interval is empty."""
        enqueued = self.enqueued if on_device else self.copied_in
        moments = {
            "startEnqMs": self.copied_in,
            "endEnqMs": enqueued,
            "startH2dMs": self.start,
            "endH2dMs": self.copied_in,
            "startComputeMs": self.copied_in,
            "endComputeMs": self.computed,
            "startD2hMs": self.computed,
            "endD2hMs": self.end,
        }
        return {
            **{name: 1e3 * (moment - origin) for name, moment in moments.items()},
            "h2dMs": 1e3 * self.host_to_device,
            "computeMs": 1e3 * self.compute,
            "d2hMs": 1e3 * self.device_to_host,
            "latencyMs": 1e3 * self.latency,
        }


@dataclass(frozen=True)
class Measurement:
    """Runs of one computation, in turns between which others may have run. warm_up: runs before the
    measured ones."""

    turns: tuple[tuple[Run, ...], ...]
    warm_up: int
    on_device: bool

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for turn in self.turns for run in turn)

    @property
    def seconds(self) -> float:
        """Wall time of the measured turns."""
        return sum(turn[-1].end - turn[0].start for turn in self.turns)

    @property
    def throughput(self) -> float:
        """Runs a second (trtexec: queries)."""
        return len(self.runs) / self.seconds

    @property
    def means(self) -> list[float]:
        """Mean latency of each turn, in seconds."""
        return [sum(run.latency for run in turn) / len(turn) for turn in self.turns]

    def summaries(self) -> dict[str, Latencies | None]:
        """Latencies by their names in trtexec, in milliseconds; None where the host has none."""
        runs = self.runs
        rows: dict[str, list[float] | None] = {
            "latency": [run.latency for run in runs],
            "enqueue": [run.enqueue for run in runs] if self.on_device else None,
            "h2d": [run.host_to_device for run in runs] if self.on_device else None,
            "compute": [run.compute for run in runs],
            "d2h": [run.device_to_host for run in runs] if self.on_device else None,
        }
        return {
            name: None if values is None else Latencies.of([1e3 * value for value in values])
            for name, values in rows.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": len(self.runs),
            "warm_up_runs": self.warm_up,
            "seconds": self.seconds,
            "throughput": self.throughput,
            **{
                f"{name}_ms": None if found is None else found.to_json()
                for name, found in self.summaries().items()
            },
        }

    def times(self) -> list[dict[str, float]]:
        """Every run for `--export-times`, after the start of the first one."""
        origin = self.turns[0][0].start
        return [run.to_json(origin, self.on_device) for run in self.runs]


def measure(
    computation: Computation, settings: Settings, clock: Clock = time.perf_counter
) -> Measurement:
    """Warm up, then run for the duration, and at least the number of iterations."""
    (measurement,) = measure_in_turns([computation], settings, 1, clock)
    return measurement


def measure_in_turns(
    computations: Sequence[Computation],
    settings: Settings,
    turns: int,
    clock: Clock = time.perf_counter,
) -> list[Measurement]:
    """Measure several computations that take `turns` turns each, so that a slow phase of the
    machine affects all. The order is reversed from turn to turn. Duration and iterations are those
    of all turns together."""
    warm_ups = [len(_turn(one, settings.warm_up, 1, clock)) for one in computations]
    share, least = settings.duration / turns, -(-settings.iterations // turns)
    taken: list[list[tuple[Run, ...]]] = [[] for _ in computations]
    for turn in range(turns):
        order = range(len(computations))
        for index in reversed(order) if turn % 2 else order:
            taken[index].append(_turn(computations[index], share, least, clock))
    return [
        Measurement(tuple(kept), warm_up, one.device is not None)
        for one, kept, warm_up in zip(computations, taken, warm_ups, strict=True)
    ]


def _turn(computation: Computation, seconds: float, least: int, clock: Clock) -> tuple[Run, ...]:
    """Runs over `seconds`, and at least `least` of them."""
    runs: list[Run] = []
    began = clock()
    while len(runs) < least or clock() - began < seconds:
        runs.append(_run(computation, clock))
    return tuple(runs)


def _run(computation: Computation, clock: Clock) -> Run:
    device = computation.device
    start = clock()
    if device is None:
        computation.start()
        end = clock()
        return Run(start, start, end, end, end)
    device.copy_in()
    device.wait()
    copied_in = clock()
    computation.start()
    enqueued = clock()
    device.wait()
    computed = clock()
    device.copy_out()
    device.wait()
    return Run(start, copied_in, enqueued, computed, clock())
