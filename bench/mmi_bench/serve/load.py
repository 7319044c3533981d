"""Loads: when requests are sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmi_deploy.errors import ConfigError

LoadKind = Literal["closed", "poisson", "gamma", "constant", "offline", "trace"]


@dataclass(frozen=True)
class Load:
    """One load.

    closed: `concurrency` requests in flight, the next one sent when one ends. poisson, gamma,
    constant: `rate` requests a second, whatever the server does; gamma has `burstiness` as the
    shape of its intervals (1: Poisson, below 1: bursts, above: more even), as in vLLM. offline: all
    at once. trace: at `times`, in seconds. ramp_up: seconds in which concurrency or rate grows
    from 0, during warm-up. seed: of the arrivals.
    """

    kind: LoadKind
    concurrency: int = 1
    rate: float = 0.0
    burstiness: float = 1.0
    ramp_up: float = 0.0
    seed: int = 0
    times: tuple[float, ...] = ()

    @property
    def is_open(self) -> bool:
        """True if requests are due at times that do not depend on the server."""
        return self.kind in ("poisson", "gamma", "constant", "trace")

    @property
    def is_fixed(self) -> bool:
        """True for a fixed set of requests, measured from the first to the last."""
        return self.kind in ("offline", "trace")

    def due_times(self, ramp_up: bool, part: int = 0) -> Iterator[float]:
        """Times of the requests of an open loop, in seconds, in order; endless unless from a trace.

        part: 0 for warm-up, then the number of the run: each has arrivals of its own.
        """
        if self.kind == "trace":
            yield from self.times
            return
        ramp = self.ramp_up if ramp_up else 0.0
        for units in self._units(part):
            yield _ramped(units, self.rate, ramp)

    def _units(self, part: int) -> Iterator[float]:
        """Arrival times at one request a second on average."""
        if self.kind == "constant":
            yield from map(float, count())
            return
        draws = np.random.default_rng([self.seed, part])
        now = 0.0
        while True:
            now += float(draws.gamma(self.burstiness, 1 / self.burstiness))
            yield now

    def describe(self) -> dict[str, Any]:
        """Facts for the report, without the times of a trace."""
        facts = {key: value for key, value in asdict(self).items() if key != "times"}
        kept = {
            "closed": ("concurrency", "ramp_up"),
            "poisson": ("rate", "ramp_up", "seed"),
            "gamma": ("rate", "burstiness", "ramp_up", "seed"),
            "constant": ("rate", "ramp_up"),
            "offline": (),
            "trace": (),
        }[self.kind]
        found = {"kind": self.kind, **{key: facts[key] for key in kept}}
        if self.kind == "trace":
            found |= {"requests": len(self.times), "seconds": self.times[-1] - self.times[0]}
        return found


def _ramped(units: float, rate: float, ramp: float) -> float:
    """Time at which `units` requests are due if the rate grows evenly to `rate` within `ramp`."""
    if units < rate * ramp / 2:
        return sqrt(2 * ramp * units / rate)
    return ramp / 2 + units / rate


def load_of(
    *,
    concurrency: int | None,
    rate: float | None,
    burstiness: float | None,
    constant: bool,
    offline: bool,
    trace: Path | None,
    ramp_up: float,
    seed: int,
) -> Load:
    """The load that the options name; the default is a closed loop of 1. Raises `ConfigError`."""
    chosen = [
        name
        for name, value in (
            ("--concurrency", concurrency is not None),
            ("--rate", rate is not None),
            ("--offline", offline),
            ("--trace", trace is not None),
        )
        if value
    ]
    if len(chosen) > 1:
        raise ConfigError("two loads contradict each other", got=" and ".join(chosen))
    if rate is None and (burstiness is not None or constant):
        raise ConfigError("--burstiness and --constant shape an open loop", fix="give --rate too")
    if constant and burstiness is not None:
        raise ConfigError("--constant has no burstiness", fix="give one of the two")
    if rate is not None:
        if not rate > 0 or not (burstiness is None or burstiness > 0):
            raise ConfigError("--rate and --burstiness must be above 0")
        if constant:
            return Load("constant", rate=rate, ramp_up=ramp_up)
        if burstiness is not None and burstiness != 1:
            return Load("gamma", rate=rate, burstiness=burstiness, ramp_up=ramp_up, seed=seed)
        return Load("poisson", rate=rate, ramp_up=ramp_up, seed=seed)
    if offline:
        return Load("offline")
    if trace is not None:
        return Load("trace", times=read_trace(trace))
    return Load("closed", concurrency or 1, ramp_up=ramp_up)


def read_trace(path: Path) -> tuple[float, ...]:
    """Read arrival times: a line each, a number of seconds or an object with "time" (seconds) or
    "timestamp" (milliseconds, as in Mooncake's traces). Raises `ConfigError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    times: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                value = value["time"] if "time" in value else value["timestamp"] / 1000
            time = float(value)
        except (ValueError, KeyError, TypeError):
            time = -1.0
        if not time >= (times[-1] if times else 0.0) or time == float("inf"):
            raise ConfigError(
                f"line {number} of {path} is not an arrival time",
                expected='seconds in ascending order, as 1.5 or {"time": 1.5}',
                got=line[:40],
            )
        times.append(time)
    if not times:
        raise ConfigError(f"{path} holds no arrival time")
    return tuple(time - times[0] for time in times)
