"""Statistics of a sample: percentiles that it carries, bootstrap and t-intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmi_bench.serve.definitions import INTERVAL, PERCENTILES, least_sample

# Bootstrap samples, and the seed of their draws.
_RESAMPLES, _SEED = 1000, 20261129

# Weights that a bootstrap holds at once.
_AT_ONCE = 4_000_000

# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Summary of one measure. requests: those with a value. percentiles: None where the sample does
    not carry it. intervals: 95 % confidence, of `mean` and of each percentile such as `p50`."""

    values: int
    requests: int
    mean: float
    least: float
    greatest: float
    percentiles: Mapping[int, float | None]
    intervals: Mapping[str, Interval]

    def to_json(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "requests": self.requests,
            "mean": self.mean,
            "min": self.least,
            "max": self.greatest,
            **{f"p{p}": value for p, value in self.percentiles.items()},
            "interval95": {name: list(interval) for name, interval in self.intervals.items()},
        }


def summary(groups: Sequence[Sequence[float]]) -> Summary | None:
    """Summarise the values of each request; None without any.

    A percentile is an order statistic of all values. It is given if there are `least_sample`
    requests: values of one request depend on each other. Intervals are bootstrapped by request.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        return None
    values = np.concatenate([np.asarray(group, np.float64) for group in groups])
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    carried = [p for p in PERCENTILES if len(groups) >= least_sample(p)]
    ones = np.ones((1, len(groups)))
    found = _statistics(values, owner, ones, carried)[:, 0]
    intervals = {}
    if len(groups) > 1:
        generator = np.random.default_rng(_SEED)
        size = max(1, _AT_ONCE // len(values))
        parts, left = [], _RESAMPLES if len(values) < 200_000 else _RESAMPLES // 5
        while left > 0:
            weights = resampled(generator, min(size, left), len(groups))
            parts.append(_statistics(values, owner, weights, carried))
            left -= size
        draws = np.concatenate(parts, axis=1)
        names = ["mean", *(f"p{p}" for p in carried)]
        intervals = {name: quantiles(draws[row]) for row, name in enumerate(names)}
    percentiles = {p: None for p in PERCENTILES} | {
        p: float(found[1 + row]) for row, p in enumerate(carried)
    }
    return Summary(
        len(values),
        len(groups),
        float(found[0]),
        float(values[0]),
        float(values[-1]),
        percentiles,
        intervals,
    )


def resampled(generator: np.random.Generator, samples: int, count: int) -> NDArray[np.float64]:
    """Weights [samples, count] of a bootstrap: how often each of `count` is drawn."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=samples)
    return drawn.astype(np.float64)


def quantiles(draws: NDArray[np.float64]) -> Interval:
    """Percentile interval of bootstrapped statistics."""
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]).tolist()
    return low, high


def _statistics(
    values: NDArray[np.float64],
    owner: NDArray[np.int64],
    weights: NDArray[np.float64],
    percentiles: Sequence[int],
) -> NDArray[np.float64]:
    """Mean and percentiles, [1 + percentiles, samples], of sorted values with a weight for each
    owner [samples, owners]."""
    each = weights[:, owner]
    total = np.cumsum(each, axis=1)
    rows = [(each * values).sum(axis=1) / total[:, -1]]
    for p in percentiles:
        # The smallest value at or below which p percent lie; less a rounding error of the product.
        target = np.maximum(np.ceil(total[:, -1:] * p / 100 - 1e-9), 1)
        rows.append(values[np.argmax(total >= target, axis=1)])
    return np.stack(rows)


def percentile(values: Sequence[float], p: float) -> float:
    """Order statistic: the smallest value at or below which `p` percent of the values lie."""
    return float(np.quantile(values, p / 100, method="inverted_cdf"))


def t_interval(values: Sequence[float]) -> Interval | None:
    """Interval of the mean of independent runs; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, half = float(np.mean(values)), t_quantile(len(values) - 1) * standard_error(values)
    return mean - half, mean + half


def standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation; None for fewer than two values, or a mean of zero."""
    mean = float(np.mean(values)) if len(values) > 1 else 0.0
    return float(np.std(values, ddof=1)) / abs(mean) if mean else None


def t_quantile(freedom: float) -> float:
    """0.975 quantile of Student's t; between whole degrees of freedom that of the lower one."""
    whole = max(1, int(freedom))
    if whole <= len(_T):
        return _T[whole - 1]
    normal = 1.959964  # Cornish-Fisher expansion in 1 / freedom
    return normal + (normal**3 + normal) / (4 * whole)


def slope_interval(times: Sequence[float], values: Sequence[float]) -> Interval | None:
    """Interval of the slope of a straight line; None for fewer than three points, or for points of
    one time."""
    x, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if len(x) < 3 or not np.ptp(x):
        return None
    away = x - x.mean()
    square = float((away**2).sum())
    slope = float((away * y).sum() / square)
    rest = y - y.mean() - slope * away
    half = t_quantile(len(x) - 2) * float(np.sqrt((rest**2).sum() / (len(x) - 2) / square))
    return slope - half, slope + half
