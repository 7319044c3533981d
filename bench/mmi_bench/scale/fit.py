"""Fits of growth, with confidence intervals by resampling the rounds.

A round measures every point once. The value of a point is the median of its rounds; an interval
comes from the same fit over rounds that are drawn with replacement, all points alike, so that a
slow round counts as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Draws of rounds, and the bounds of the interval in percent.
_DRAWS = 1000
_BOUNDS = (2.5, 97.5)

# Least fixed part, of the mean, by which growth is divided.
_LEAST_FIXED = 0.01

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval of 95 %."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return vars(self).copy()


@dataclass(frozen=True)
class Fit:
    """Growth of one quantity y with x.

    exponent: slope of log y over log x among the larger half of the points, where a fixed part
    counts least; None with fewer than two of them. fixed, slope: of y = fixed + slope x, by least
    squares of relative errors. growth: slope over fixed, the share by which one unit of x adds to
    the fixed part; None unless the fixed part is positive.
    """

    exponent: Estimate | None
    fixed: float
    slope: float
    growth: Estimate | None

    def to_json(self) -> dict[str, Any]:
        return {
            "exponent": self.exponent.to_json() if self.exponent else None,
            "fixed": self.fixed,
            "slope": self.slope,
            "growth": self.growth.to_json() if self.growth else None,
        }


def fit(points: Sequence[int], rounds: Sequence[Sequence[float]], seed: int = 0) -> Fit:
    """Fit the measurements `rounds` [rounds][points], all positive."""
    x, y = np.array(points, float), np.array(rounds, float)
    draws = np.random.default_rng(seed).integers(0, len(y), (_DRAWS, len(y)))
    middle, resampled = np.median(y, axis=0), np.median(y[draws], axis=1)  # [p], [draws, p]
    upper = x >= max(np.median(x), 1)

    def estimate(of: Callable[[Floats], Floats]) -> Estimate:
        low, high = np.percentile(of(resampled), _BOUNDS)
        return Estimate(float(of(middle[None])[0]), float(low), float(high))

    fixed, slope = (float(one[0]) for one in line(x, middle[None]))
    return Fit(
        estimate(lambda rows: power(x[upper], rows[:, upper])) if upper.sum() > 1 else None,
        fixed,
        slope,
        estimate(lambda rows: _share(x, rows)) if fixed > 0 else None,
    )


def power(x: Floats, y: Floats) -> Floats:
    """Slopes of log y [rows, points] over log x [points], by least squares."""
    logs = np.log(x) - np.log(x).mean()
    slopes: Floats = np.log(y) @ logs / (logs @ logs)
    return slopes


def line(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """a, b of y = a + b x for rows of y [rows, points], by least squares of relative errors."""
    weight = 1 / y**2
    total = weight.sum(axis=1)
    mean_x = (weight * x).sum(axis=1) / total
    mean_y = (weight * y).sum(axis=1) / total
    from_mean = x - mean_x[:, None]
    slope = (weight * from_mean * y).sum(axis=1) / (weight * from_mean**2).sum(axis=1)
    return mean_y - slope * mean_x, slope


def _share(x: Floats, y: Floats) -> Floats:
    """Slope over fixed part; a fixed part that noise leaves too small counts as `_LEAST_FIXED`."""
    fixed, slope = line(x, y)
    share: Floats = slope / np.maximum(fixed, _LEAST_FIXED * y.mean(axis=1))
    return share
